"""The command line: `tunewise COMMAND`; one sentence and an exit code for whatever goes wrong."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, get_args

import cyclopts
from cyclopts import App

from tunewise import __version__
from tunewise.commands import catalog, check, compare, doctor, estimate, runs, start

__all__ = ["app", "main"]

KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}

app = App(
    name="tunewise",
    version=__version__,
    help="Fine-tune a pretrained model on your data: every method is one command.\n\n"
    "Start with `tunewise demo`, or `tunewise tune minilm reviews --method lora`.",
)
COMMANDS: tuple[Callable[..., None], ...] = (
    start.demo,
    start.tune,
    compare.compare,
    compare.report,
    estimate.estimate,
    runs.predict,
    runs.evaluate,
    runs.merge,
    runs.export,
    catalog.methods,
    catalog.show,
    check.check,
    doctor.doctor,
)
for place, function in enumerate(COMMANDS):
    app.command(function, name="eval" if function is runs.evaluate else None, sort_key=place)


def _commands() -> list[str]:
    return [name for name in app if not name.startswith("-")]


def _options(chain: Sequence[str]) -> list[str]:
    parsed = app[chain[0]].assemble_argument_collection()
    return sorted({"--help", *(name for a in parsed for name in a.names if name.startswith("--"))})


def _first_other_word(tokens: Sequence[str]) -> str:
    return next((t for t in tokens if not t.startswith("-")), tokens[0] if tokens else "")


def _sentence(error: cyclopts.CycloptsError, tokens: Sequence[str]) -> str:
    """What was expected on the command line, with the nearest right spelling."""
    from tunewise.core.errors import did_you_mean

    # cyclopts takes what belongs to no command for a word of the command before it: the first word decides.
    chain = [t for t in tokens[:1] if t in _commands()]
    if not chain:
        word = _first_other_word(tokens)
        kind = "option" if word.startswith("-") else "command"
        return f'There is no {kind} "{word}"{did_you_mean(word, [*_commands(), "--help", "--version"])}'
    command = chain[0]
    token: Any = getattr(error, "token", None)
    if isinstance(error, cyclopts.UnknownOptionError) and token is not None:
        given = (token.keyword or token.value or "").split("=", 1)[0]
        return f'{command} has no option "{given}"{_near_option(given, chain)}'
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        unknown = [t.split("=", 1)[0] for t in tokens if t.startswith("--")]
        unknown = [t for t in unknown if t not in _options(chain)]
        if unknown:
            return f'{command} has no option "{unknown[0]}"{_near_option(unknown[0], chain)}'
        return _missing(error, command)
    if isinstance(error, cyclopts.CoercionError) and token is not None:
        option = token.keyword or (error.argument.name if error.argument is not None else "")
        kinds = [k for k in get_args(error.target_type) if k is not type(None)] or [error.target_type]
        wanted = " or ".join(
            KINDS.get(k, k if isinstance(k, str) else "another kind of value") for k in kinds
        )
        return f'{command}: {option} takes {wanted}, not "{token.value}".'
    unused = [t for t in error.unused_tokens or [] if t]
    if unused:
        kind = "option" if unused[0].startswith("-") else "argument"
        near = _near_option(unused[0], chain) if kind == "option" else "; see its --help."
        return f'{command} takes no {kind} "{unused[0]}"{near}'
    return f"{command}: {' '.join(str(error).split())}"


def _near_option(given: str, chain: Sequence[str]) -> str:
    from tunewise.core.errors import did_you_mean
    from tunewise.core.method import PEFT_SPELLINGS, get_method, method_names

    plain = given.lstrip("-").replace("-", "_")
    ours = PEFT_SPELLINGS.get(plain, "")
    if ours.startswith("--"):
        return f"; here it is called {ours}."
    if ours:
        names = sorted(method_names(), key=lambda name: (name not in plain, name != "lora"))
        owner = next(name for name in names if ours in get_method(name).signature.parameters)
        return f'; it belongs to the method: --method "{owner}({ours}=...)".'
    return did_you_mean(given, _options(chain))


def _missing(error: cyclopts.MissingArgumentError, command: str) -> str:
    assert error.argument is not None
    name = error.argument.name
    if error.keyword is not None:
        return f"{command}: {error.keyword} needs a value."
    examples = {"--method": " (for example --method lora; `tunewise methods` lists all)"}
    return f"{command} needs {name}{examples.get(name, '')}."


def _unexpected(error: BaseException) -> str:
    """Where the whole traceback was written, so that the terminal shows one sentence."""
    handle, name = tempfile.mkstemp(prefix="tunewise-", suffix=".log", text=True)
    with open(handle, "w", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    first = " ".join(str(error).split())[:300]
    return (
        f"unexpected {type(error).__name__}: {first} (the whole traceback is in {name}; "
        "TUNEWISE_DEBUG=1 shows it here)."
    )


def _how_to_resume(tokens: Sequence[str], report: str = "") -> str:
    """What a command that was stopped by hand leaves behind, and how it goes on."""
    if "compare" in tokens[:1] and "--dry-run" not in tokens:
        so_far = f"the report so far is {report}; " if report else ""
        return f"stopped; {so_far}the same command again goes on: tunewise {shlex.join(tokens)}"
    if "tune" not in tokens[:1]:
        return "stopped."
    if "--out" not in " ".join(tokens):
        return "stopped; give a run a folder with --out, then --resume goes on where it stopped."
    words = [*tokens] if "--resume" in tokens else [*tokens, "--resume"]
    return f"stopped; go on with: tunewise {shlex.join(words)}"


def _fail(sentence: str, code: int) -> int:
    print(f"tunewise: {sentence}", file=sys.stderr)
    return code


def run(tokens: Sequence[str]) -> int:
    """Runs one command and gives its exit code: 0 done, 1 a run failed, 2 bad input, 130 stopped by hand."""
    try:
        try:
            command, bound, _ = app.parse_args(list(tokens), exit_on_error=False, print_error=False)
        except cyclopts.CycloptsError as error:
            return _fail(_sentence(error, tokens), 2)
        run_it: Callable[..., Any] = command
        run_it(*bound.args, **bound.kwargs)
    except KeyboardInterrupt as stopped:
        return _fail(_how_to_resume(tokens, str(stopped)), 130)
    except BrokenPipeError:
        # Whoever read our output has closed it, as `tunewise methods | head` does; nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("TUNEWISE_DEBUG") == "1":
            raise
        code = getattr(error, "exit_code", None)
        return _fail(_unexpected(error), 1) if code is None else _fail(str(error), code)
    return 0


def main() -> None:
    """Entry point of the `tunewise` script."""
    sys.exit(run(sys.argv[1:]))
