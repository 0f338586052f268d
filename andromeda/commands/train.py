"""`andromeda train`: from a recipe to a run directory, and on from where it stopped."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from andromeda.commands.output import hushed, plural, say

if TYPE_CHECKING:
    from andromeda.training.processes import Processes
    from andromeda.training.recipe import Recipe


def train(recipe: str, overrides: list[str]) -> None:
    """Trains a model on text or on a build of data, as a recipe says, or goes on with the run where it stopped.

    Stop it with Ctrl-C and start it again: it goes on exactly as if it had not been stopped. Paths in the recipe are
    relative to the current directory.

    Args:
        recipe: YAML file, such as recipes/verse.yaml.
        overrides: key=value for single keys, such as steps=100 or model.dim=64.
    """
    from andromeda.training.processes import join_processes
    from andromeda.training.recipe import read_recipe

    with join_processes() as processes, hushed(not processes.first):
        with processes.first_alone():  # its mistakes are told once
            plan = read_recipe(recipe, overrides)
        _train(plan, processes)


def _train(plan: Recipe, processes: Processes) -> None:
    from andromeda.commands.session import prepare
    from andromeda.commands.start import check_start, find_start
    from andromeda.commands.training_data import open_build, within_build
    from andromeda.training.engines import check_engine
    from andromeda.training.lora import check_lora
    from andromeda.training.processes import check_teams
    from andromeda.training.run import RunDirectory, open_run
    from andromeda.training.signals import stop_request
    from andromeda.training.trackers import check_trackers

    path = Path(plan.output)
    with processes.first_alone():
        check_teams(plan.context_parallel, processes.ranks)
        check_lora(plan.lora, processes.ranks)
        check_trackers(plan.track)
        check_engine(plan, processes)
        stream = open_build(plan, check=processes.first)
        if processes.first and not RunDirectory(path).checkpoints():
            check_start(plan, stream)
    processes = processes.in_teams(plan.context_parallel)
    with open_run(plan) if processes.first else nullcontext(RunDirectory(path)) as run:
        start = find_start(plan, run, stream, processes)
        plan = within_build(plan, stream, start.state)
        if start.state.step >= plan.num_steps:
            say(f"{run.path}: finished already, at step {start.state.step:,}; raise steps to go on")
            return
        session = prepare(plan, run, start, stream, processes)
        session.introduce()
        with stop_request() as stop, processes.patience(plan.patience):
            session.run(stop)
    if session.state.step < plan.num_steps:
        received = stop.received or signal.SIGTERM  # another process was asked
        say(f"{run.path}: stopped by {received.name} at step {session.state.step:,}; the same command goes on")
        raise SystemExit(128 + received)
    say(f"{run.path}: finished {plural(plan.num_steps, 'step')}; the model is {run.checkpoint(plan.num_steps)}")
