"""The model behind OpenAI's API: what is asked, what is answered, and what keeps the server up."""
