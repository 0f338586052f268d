"""An engine that writes many texts at once; its parts, from policy to tensors:

* `request`: what is asked, and what comes back. `engine` answers it; `service` serves that to asyncio.
* `blocks`, `scheduler`, `lookup`: policy, without tensors.
* `pages`, `batch`, `runner`, `sampler`: tensors, without policy. `masks`: what constraints allow, meanwhile.
"""
