"""``danlu sample``: text or images from a trained run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu._validate import choice, integer, number
from danlu.cli.common import add_run, is_text, open_run, printable

if TYPE_CHECKING:
    from danlu.train.load import RunAt

EXAMPLES = """\
  danlu sample runs/lm-1 --prompt "def main("
  danlu sample runs/lm-1 --prompt "import " --tokens 400 --temperature 0.7 --top-p 0.95
  danlu sample runs/lm-1 --prompt "class " --temperature 0 --tokens 100       the most likely text
  danlu sample runs/lm-1 --prompt "class " --count 3 --seed 7                 three, the same each time
  danlu sample runs/lm-1@600 --prompt "class "                                by its checkpoint of step 600
  danlu sample runs/lm-1 --prompts prompts.txt --stop "\\ndef "                one prompt a line, written together
  danlu sample runs/digits-1 --steps 1 --out x.png                            64 images, in one step each
  danlu sample runs/digits-flow-1 --steps 50 --out x.gif --classes 3 7        how they come about, of two classes"""

_IMAGES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_run(parser)
    parser.add_argument("--prompt", metavar="TEXT", default="", help="the text to continue (default: a new document)")
    parser.add_argument("--prompts", metavar="FILE", help="continue every line of a text file, all together")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest tokens that hold probability P (default: 1)"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw among tokens at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="lower the logits of used tokens (default: 1)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (\\n: a new line; may be repeated)",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="draw the same each time (default: another)")
    parser.add_argument("--count", type=int, metavar="N", help="how many to write (default: 1 text, 64 images)")
    parser.add_argument("--out", metavar="FILE", help="images: .png, or .gif or .webp for the way to them")
    parser.add_argument("--classes", metavar="NAME", nargs="+", help="images of these classes in turn (default: all)")
    parser.add_argument("--upsample", type=int, metavar="S", help="images S times as high and wide as those trained on")
    parser.add_argument("--steps", type=int, metavar="N", help="images: steps of the sampler")
    parser.add_argument("--guidance", type=float, metavar="W", help="images: scale of guidance to the class")


def run(arguments: argparse.Namespace) -> int:
    """Continue a prompt and print the text while it is written; or draw images."""
    at = open_run(arguments, "sample")
    for option, low in (("count", 1), ("seed", 0), ("tokens", 1), ("top_k", 1), ("upsample", 1), ("steps", 1)):
        value = getattr(arguments, option)
        if value is not None:
            integer(f"--{option.replace('_', '-')}", value, low=low, high=2**63 - 1 if option == "seed" else None)
    number("--temperature", arguments.temperature, low=0)
    if arguments.repetition_penalty is not None:
        number("--repetition-penalty", arguments.repetition_penalty, low=0, low_open=True)
    if arguments.top_p is not None:
        number("--top-p", arguments.top_p, low=0, high=1, low_open=True)
    if arguments.min_p is not None:
        number("--min-p", arguments.min_p, low=0, high=1)
    return _write(arguments, at) if is_text(at.folder) else _draw(arguments, at)


def _write(arguments: argparse.Namespace, at: "RunAt") -> int:
    """Continue one prompt and print the text while it is written, or several together."""
    for option in ("steps", "guidance", "out", "classes", "upsample"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for runs on images; {arguments.folder} is a run on text")
    from danlu.data import load_tokenizer
    from danlu.evaluation import continuation, continuations
    from danlu.train import load

    model, _ = load(at)
    tokenizer = load_tokenizer(Path(arguments.folder) / "tokenizer.json")
    prompts = _prompts(arguments)
    options = {
        "tokens": arguments.tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty or 1.0,
        "seed": arguments.seed,
        "stop": [text.replace("\\n", "\n") for text in arguments.stop],
    }
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
        for piece in continuation(model, tokenizer, prompt=prompts[0], **options):
            print(printable(piece), end="", flush=True)
        print()
        return 0
    for index, text in enumerate(continuations(model, tokenizer, prompts=prompts, **options)):
        print(f"--- {index + 1} of {len(prompts)}", prompts[index] + printable(text), sep="\n", flush=True)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The texts to continue: that of --prompt, or the lines of a file; each --count times."""
    prompts = [arguments.prompt]
    if arguments.prompts is not None:
        if arguments.prompt:
            raise ValueError("give --prompt or --prompts, not both")
        prompts = [line for line in Path(arguments.prompts).read_text(encoding="utf-8").splitlines() if line]
        if not prompts:
            raise ValueError(f"{arguments.prompts} has no line that is not empty")
    return [prompt for prompt in prompts for _ in range(arguments.count or 1)]


def _draw(arguments: argparse.Namespace, at: "RunAt") -> int:
    """Draw images and write them as one picture, or the way to them as an animation."""
    import torch

    from danlu.evaluation import class_names, draw_classes, sampling_steps
    from danlu.protocols import Generator
    from danlu.report import write_images
    from danlu.train import load_objective

    for option in ("prompt", "prompts", "stop", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(arguments, option):
            raise ValueError(f"--{option.replace('_', '-')} is for runs on text; {arguments.folder} has no tokenizer")
    objective, config = load_objective(at)
    model: Any = config.model
    if not isinstance(objective, Generator):
        kind = type(objective).__name__
        raise ValueError(f"{arguments.folder} is a run of {kind}, which writes no text and draws no images")
    out = Path(arguments.out or Path(arguments.folder) / "drawn.png")
    choice("--out, its suffix,", out.suffix.lower(), (".png", ".jpg", ".webp", ".gif"))
    moving = out.suffix.lower() in (".gif", ".webp")
    names = class_names(arguments.folder, model.num_classes)
    chosen = None
    if arguments.classes is not None:
        if not names:
            raise ValueError(f"--classes: {arguments.folder} was trained without classes")
        for name in arguments.classes:
            choice("--classes", name, names)
        chosen = torch.tensor([names.index(name) for name in arguments.classes])
    larger = {}
    if arguments.upsample is not None:
        larger = {"upsample": arguments.upsample}
    images = draw_classes(
        objective,
        model,
        arguments.count or _IMAGES,
        classes=chosen,
        steps=sampling_steps(objective, arguments.steps),
        seed=arguments.seed,
        guidance=arguments.guidance,
        trajectory=moving,
        **larger,
    )
    print(write_images(out, images))
    return 0
