"""`megatron-dgpo sft | train | eval | serve | launch CONFIG [MORE.yaml ...] [section.name=value ...]`,
`megatron-dgpo settings [SECTION]` and `megatron-dgpo plot RUN`"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_dgpo import legality, process, sbatch, stop
from megatron_dgpo.cluster import Node, torchrun_environment
from megatron_dgpo.config import Config
from megatron_dgpo.config_file import config_text, load_config
from megatron_dgpo.data import check_file
from megatron_dgpo.errors import UsageError
from megatron_dgpo.layout import own_servers
from megatron_dgpo.settings_table import settings_of
from megatron_dgpo.weights.architectures import read_architecture

_WIDTH = 100
_COMMANDS = {
    "sft": "fine-tune on written solutions",
    "train": "run or continue DGPO training",
    "eval": "report avg@k and pass@k of a checkpoint or a Hugging Face directory",
    "serve": "run one vLLM server as training expects it",
    "launch": "submit a training run to SLURM",
    "settings": "list all settings, or a section's, with types, defaults and meaning",
    "plot": "draw what a run reports against its steps",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. A UsageError is printed as a sentence, without a traceback."""
    if arguments is None:
        # A process of its own. Imports take seconds: a signal to stop must not end it before somebody can act on it.
        stop.block()
        # Ctrl-C ends it without a traceback, until something is started that must be ended, too (launcher.py).
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        arguments = sys.argv[1:]
    options = _parse(arguments)
    try:
        if options.command == "settings":
            return _show_settings(options.section)
        if options.command == "plot":
            return _plot(options.run)
        # In an array of jobs %a stands for the index, which is not known before the job runs.
        array = options.command == "launch"
        overrides = [o.replace("%a", "0") if array else o for o in options.overrides]
        if getattr(options, "model", None):
            overrides.append(f"model.path={options.model}")
        config = load_config(options.config, overrides)
        if options.show_config:
            print(config_text(config), end="")
            return 0
        return _run(options, config, arguments)
    except UsageError as error:
        print(f"megatron-dgpo {options.command}: {error}", file=sys.stderr)
        return 2


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-dgpo", description="DGPO for large language models on Megatron-Core and vLLM"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    for name, purpose in _COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if name == "settings":
            command.add_argument("section", nargs="?", choices=list(Config.model_fields), metavar="SECTION")
            continue
        if name == "plot":
            command.add_argument("run", type=Path, help="the run.dir of a run")
            continue
        command.add_argument("config", type=Path, help="YAML file of settings")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="section.name=value", help="or a file: settings over CONFIG's"
        )
        command.add_argument("--show-config", action="store_true", help="print every setting's value and start nothing")
        if name == "eval":
            source = command.add_mutually_exclusive_group()
            source.add_argument("--checkpoint", type=Path, help="a step_N folder; default: the run's newest")
            source.add_argument("--model", type=Path, help="a Hugging Face directory instead of a checkpoint")
        if name == "serve":
            command.add_argument("--host", default="127.0.0.1", help="address to listen on")
            command.add_argument("--port", type=int, default=8000)
        if name == "launch":
            _add_sizes(command)
    # argparse takes a list of positionals only in one piece; overrides may also follow an option.
    options, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = options.overrides + rest
    return options


def _add_sizes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", type=_count, default=1, help="trainer nodes")
    command.add_argument(
        "--rollout-nodes", type=_count, default=0, help="vLLM nodes; none: each trainer node runs servers"
    )
    command.add_argument("--gpus-per-node", type=_count)
    command.add_argument("--rollout-gpus-per-node", type=_count, help="makes a heterogeneous job if it differs")
    command.add_argument("--time", help="limit of the job, as sbatch writes it")
    command.add_argument("--sbatch", action="append", default=[], metavar="--OPTION=VALUE", help="for sbatch as it is")
    command.add_argument("--dry-run", action="store_true", help="print the sbatch file instead of submitting it")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def _show_settings(section: str | None) -> int:
    for setting in (s for name in ([section] if section else Config.model_fields) for s in settings_of(name)):
        name, kind, default, meaning = (text.replace("`", "") for text in setting)
        print(f"{name} = {default}   [{kind}]")
        if meaning:
            print(textwrap.fill(meaning, _WIDTH, initial_indent="    ", subsequent_indent="    "))
    return 0


def _plot(run: Path) -> int:
    from megatron_dgpo.plot import plot_run

    metrics = run / "metrics" / "train.jsonl"
    if not metrics.is_file():
        raise UsageError(f"{metrics}: no such file; expected the run.dir of a training run")
    print(plot_run(metrics, run / "plot.png", run.resolve().name))
    return 0


def _launch(options: argparse.Namespace, config: Config) -> int:
    size = sbatch.Size(options.nodes, options.rollout_nodes, options.gpus_per_node, options.rollout_gpus_per_node)
    text = sbatch.write(config, options.config, options.overrides, size, options.time, options.sbatch)
    print(text if options.dry_run else f"submitted as job {sbatch.submit(text)}")
    return 0


def _run(options: argparse.Namespace, config: Config, arguments: list[str]) -> int:
    if options.command == "launch":
        return _launch(options, config)
    with _refusals_told(options.config):
        _check_names(options.command, config)
    from megatron_dgpo import launcher, machine

    machine.choose_device()
    if launcher.is_rank():
        return _run_rank(options, config)
    node = Node.here(config.run.dir)
    if options.command == "eval" and not node.in_job:
        # Beside those of a training that may be running.
        node = replace(node, logs=node.logs / "eval")
    if options.command == "serve" and not node.in_job:
        return launcher.serve(config, options.host, options.port)
    with node.telling_refusals():
        if options.command == "serve":
            return launcher.serve_node(config, node)
        return _start(options, config, arguments, node)


def _start(options: argparse.Namespace, config: Config, arguments: list[str], node: Node) -> int:
    """This node's share of a command that needs ranks."""
    from megatron_dgpo import launcher

    if options.command != "sft" and config.rollout.replay is None:
        config = launcher.find_servers(config, node)
    world_size = launcher.trainer_size(config, node)
    if node.index == 0:
        _check(options, config, world_size, world_size // node.count)
        _say_device(options, config, world_size // node.count, node.count, node.logs)
    return launcher.launch(arguments, config, node, world_size)


def _check_names(command: str, config: Config) -> None:
    """Of models and files, which are mistyped most often: told before imports that take seconds."""
    frozen = () if command == "serve" else (config.model.reference, config.model.start)
    for model in filter(None, (config.model.path, *frozen)):
        read_architecture(model)
    if command == "sft" and config.sft.data:
        check_file(config.sft.data, "sft.data")
    if command == "train":
        check_file(config.data.train, "data.train")
    for file in config.data.eval if command in ("train", "eval") else ():
        check_file(file, "data.eval")


def _check(options: argparse.Namespace, config: Config, world_size: int, local_size: int) -> None:
    from megatron_dgpo.preflight import check

    checkpoint, from_model = getattr(options, "checkpoint", None), bool(getattr(options, "model", 0))
    with _refusals_told(options.config):
        check(options.command, config, world_size, local_size, checkpoint, from_model)


@contextlib.contextmanager
def _refusals_told(config: Path) -> Iterator[None]:
    """A folder that may not be entered, a name too long: whichever file it was, the system says why."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{error.filename or config}: {error.strerror or error}") from None


def _say_device(
    options: argparse.Namespace, config: Config, local_size: int, nodes: int, logs: Path | None = None
) -> None:
    from megatron_dgpo import machine

    servers = own_servers(options.command, config)
    each = f"each of {nodes} nodes: " if nodes > 1 else ""
    line = machine.describe(local_size, servers, config.model.layer_spec)
    where = f"; logs in {logs}" if logs else ""
    print(f"megatron-dgpo {options.command}: {each}{line}{where}", file=sys.stderr, flush=True)


def _run_rank(options: argparse.Namespace, config: Config) -> int:
    from megatron_dgpo.rollout import server
    from megatron_dgpo.run_lock import run_lock

    # The launcher's way to end a rank at once, whatever it waits for.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    process.stacks_on_request()
    # Libraries talk to the rank's log; rank 0's standard output is the user's.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    world_size = int(os.environ["WORLD_SIZE"])
    legality.check(legality.of_world(config.parallel, world_size))
    lock: contextlib.AbstractContextManager = contextlib.nullcontext()
    if server.ADDRESSES not in os.environ:
        # Not started by our launcher, which has checked already.
        for name, value in torchrun_environment().items():
            os.environ.setdefault(name, value)
        if os.environ["RANK"] == "0":
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            _check(options, config, world_size, local_size)
            _say_device(options, config, local_size, world_size // local_size)
            lock = run_lock(config.run.dir) if options.command != "eval" else lock
    with lock:
        return _run_command(options, config)


def _run_command(options: argparse.Namespace, config: Config) -> int:
    from megatron_dgpo.model.compat import compiled_at_first_call

    with compiled_at_first_call():
        from megatron_dgpo import evaluation, sft, trainer

    finished = True
    if options.command == "sft":
        finished = sft.sft(config)
    elif options.command == "train":
        finished = trainer.train(config)
    else:
        evaluation.evaluate_policy(config, options.checkpoint, from_model=options.model is not None)
    return 0 if finished else stop.STOPPED


if __name__ == "__main__":
    sys.exit(main())
