"""The command line: yoco-ext info | demo | train | generate | convert | bench."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, _library
from .config import CHECKPOINT_FORMATS, SELF_DECODERS, YOCOConfig
from .nn.basic import OPS

_TRAINING_HELP = {
    "steps": "optimizer steps",
    "batch_size": "windows per batch",
    "seq_len": "tokens per window",
    "accumulate": "batches per optimizer step",
    "lr": "highest learning rate",
    "min_lr": "learning rate of the last step",
    "warmup_steps": "steps up to the highest learning rate",
    "weight_decay": "of the matrices",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "clip_norm": "largest norm of a step's gradient",
    "seed": "of weights and data order",
}

Handler = Callable[[argparse.Namespace], int]


class UsageError(Exception):
    """Something the caller can put right; shown as one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # has its own options
        return _bench(argv[1:])
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return options.handler(options)
    except (UsageError, ValueError, ImportError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        print(f"yoco-ext {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"yoco-ext {options.command}: interrupted", file=sys.stderr)
        return 130


# ---- options ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="yoco-ext",
        description="YOCO (You Only Cache Once): train and run decoder-decoder language models on fused kernels.",
        epilog="example: yoco-ext demo",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, handler: Handler, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=_Formatter,
        )
        sub.set_defaults(handler=handler)
        return sub

    info = command("info", _info, "what this build is and runs on", "yoco-ext info --kernels")
    info.add_argument("--kernels", action="store_true", help="also each back end's kernels, their registers and memory")

    demo = command(
        "demo",
        _demo,
        "train a small byte-level YOCO on real text and let it write (about three minutes on two cores)",
        "yoco-ext demo --text ~/notes --output notes_demo",
    )
    _add_text(demo)
    demo.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for checkpoint, figures, plots")
    demo.add_argument("--seconds", type=_positive_float, default=_demo_default("seconds"), help="training time")
    demo.add_argument("--steps", type=_positive_int, help="training steps, instead of --seconds")
    for name, text in (
        ("batch-size", "windows per step"),
        ("seq-len", "bytes per window"),
        ("hidden-size", "width of the model, a multiple of 64"),
        ("num-layers", "layers; half of them self-decoder"),
        ("prompt-bytes", "length of the prompt"),
        ("new-bytes", "length of the continuation"),
    ):
        demo.add_argument(f"--{name}", type=_positive_int, default=_demo_default(name.replace("-", "_")), help=text)
    _add_machine(demo)
    demo.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")

    train = command(
        "train",
        _train,
        "train a byte-level YOCO on text",
        "yoco-ext train --text corpus/ --output run1 --preset 160m --steps 5000 --precision bfloat16",
    )
    _add_text(train)
    train.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    train.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    shape = train.add_mutually_exclusive_group()
    shape.add_argument("--preset", help="shape of one of the paper's models (160m ... 13b)")
    shape.add_argument("--config", type=Path, metavar="JSON", help="file with the fields of YOCOConfig")
    train.add_argument("--self-decoder", choices=SELF_DECODERS, help="instead of the preset's")
    for field in _training_fields():
        flag = "--" + field.name.replace("_", "-")
        if field.name == "checkpoint_activations":
            train.add_argument(flag, action="store_true", help="recompute the layers in the backward: less memory")
        elif field.name != "precision":
            kind = {"int": int, "float": float}[str(field.type)]
            text = _TRAINING_HELP[field.name]
            train.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text)
    train.add_argument("--save-every", type=_positive_int, default=500, metavar="STEPS", help="write a checkpoint")
    _add_machine(train)

    generate = command(
        "generate",
        _generate,
        "continue a prompt with a byte-level checkpoint",
        "yoco-ext generate demo_output/checkpoint --prompt 'def main(' --temperature 0.7",
    )
    generate.add_argument("checkpoint", type=Path, help="folder with config.json and model.safetensors")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompt-file", type=Path, help="file with the text to continue; - for standard input")
    generate.add_argument("--max-new-tokens", type=_positive_int, default=256, help="length of the continuation")
    generate.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="only among the k likeliest; 0: off")
    generate.add_argument("--top-p", type=float, default=0.95, help="only among the likeliest that hold this mass")
    generate.add_argument("--seed", type=int, help="for a repeatable continuation")
    _add_machine(generate)

    convert = command(
        "convert",
        _convert,
        "write a checkpoint in the files and names of another code base, weight for weight",
        "yoco-ext convert run1 run1_unilm --from yoco --to unilm",
    )
    convert.add_argument("source", type=Path, help="folder of the checkpoint")
    convert.add_argument("target", type=Path, help="folder to write, made if needed")
    formats = "unilm: params.json and .pt; fla, hf: config.json and safetensors; yoco: this package's own"
    convert.add_argument("--from", dest="source_format", choices=CHECKPOINT_FORMATS, help="default: what the files say")
    convert.add_argument("--to", choices=CHECKPOINT_FORMATS, required=True, help=formats)

    # Listed for --help; main hands its options over unread.
    commands.add_parser("bench", help="time the ops beside their peers", add_help=False)
    return parser


def _add_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="file or folder; without it the Python standard library's source")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", choices=OPS, default="fused", help="compiled kernels or plain PyTorch")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where this build has kernels for it)")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of activations (default: bfloat16 where the processor multiplies it)",
    )


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _demo_default(name: str) -> Any:
    from .demo import DemoOptions

    return DemoOptions.__dataclass_fields__[name].default


def _training_fields() -> tuple[dataclasses.Field[Any], ...]:
    from .training import TrainingConfig

    return dataclasses.fields(TrainingConfig)


def _device(options: argparse.Namespace) -> str:
    if options.device is None:
        has_kernels = options.ops == "reference" or _library.backend_variant("cuda") is not None
        return "cuda" if torch.cuda.is_available() and has_kernels else "cpu"
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        raise UsageError(f"--device {options.device}: no such device") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"--device {options.device}: PyTorch sees {torch.cuda.device_count()} GPUs")
    return options.device


# ---- commands --------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    print(f"yoco_ext    {__version__}")
    try:
        from . import _C
    except ImportError:
        print("build       unknown (the optional module yoco_ext._C is not there)")
    else:
        cuda = f"CUDA {_C.cuda_compiler} for {_C.cuda_archs}" if _C.cuda_archs else "no CUDA"
        print(f"build       {_C.git_revision or 'unknown revision'}, {_C.cxx_compiler}, CPU {_C.cpu_isas}, {cuda}")
    print(f"torch       {torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            print(f"gpu         {torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    else:
        print("gpu         none that PyTorch sees")
    if not _library.is_built():
        print(f"ops         not built: {_library.ops_library()} is not a file; yoco_ext.reference works")
        return 0
    print(f"ops         {_library.ops_library().resolve()}")
    _library.load()
    for name in ("cpu", "cuda"):
        variant = _library.backend_variant(name)
        print(f"{name:<12}{'kernels for ' + variant if variant is not None else 'no kernels in this build'}")
    if options.kernels:
        _print_entries()
        _print_report()
    return 0


def _print_entries() -> None:
    """Which back end has a kernel for what."""
    ops = {name: _library.backend_ops(name) for name in ("cpu", "cuda")}
    print("\nkernel entries".ljust(34) + "".join(f"{name:<8}" for name in ops))
    for entry in ops["cpu"]:
        cells = ("yes" if found.get(entry) else "none" if found else "-" for found in ops.values())
        print(f"  {entry:<31}" + "".join(f"{cell:<8}" for cell in cells))


def _print_report() -> None:
    """Registers, spills and shared memory of the CUDA kernels, as the compiler reported them."""
    report = _library.kernel_report()
    if not report:
        where = _library.ops_library().parent / _library.KERNEL_REPORT
        print(f"\nno report on CUDA kernels: {where} is {'empty' if report == [] else 'not there'}. A CUDA build with")
        print("machine code (YOCO_EXT_CUDA=1, YOCO_CUDA_ARCHS without -virtual) writes it.")
        return
    print("\nCUDA kernels: registers per thread; bytes spilled (stored, loaded) and on the stack per thread; static")
    print("shared memory in bytes per block (what a launch asks for on top of it: tables in docs/cuda_*.md)")
    width = min(76, max(len(kernel["name"]) for kernel in report))
    print(f"  {'kernel':<{width}} {'arch':<7}{'registers':>9}{'spilled':>12}{'stack':>7}{'shared':>8}")
    for kernel in report:
        spilled = f"{kernel['spill_stores']}, {kernel['spill_loads']}"
        figures = f"{kernel['registers']:>9}{spilled:>12}{kernel['stack']:>7}{kernel['shared']:>8}"
        print(f"  {kernel['name']:<{width}} {kernel['arch']:<7}{figures}")


def _demo(options: argparse.Namespace) -> int:
    from .demo import DemoOptions, run_demo

    fields = {field.name for field in dataclasses.fields(DemoOptions)}
    values = {name: value for name, value in vars(options).items() if name in fields}
    if options.hidden_size % 64:
        raise UsageError(f"--hidden-size must be a multiple of 64, got {options.hidden_size}")
    run_demo(DemoOptions(**(values | {"device": _device(options)})))
    return 0


def _train(options: argparse.Namespace) -> int:
    from .data import VOCAB_SIZE, Batches, load_corpus
    from .model import YOCOForCausalLM
    from .training import Trainer, TrainingConfig, bits_per_byte, default_precision

    device = _device(options)
    if options.resume:
        corpus = load_corpus(options.text)
        trainer = Trainer.resume(options.output, corpus.train, ops=options.ops, device=device)
        config = trainer.config
        print(f"resuming {options.output} at step {trainer.step} of {config.steps}")
    else:
        if (options.output / "trainer.pt").exists():
            raise UsageError(
                f"{options.output} holds a run already: continue it with --resume or name another --output"
            )
        values = {field.name: getattr(options, field.name) for field in _training_fields()}
        values["precision"] = options.precision or default_precision(device)
        config = TrainingConfig(**values)
        shape = _model_config(options, VOCAB_SIZE)
        corpus = load_corpus(options.text)
        torch.manual_seed(config.seed)
        model = YOCOForCausalLM(shape, options.ops).to(device)
        trainer = Trainer(model, config, Batches(corpus.train, config.batch_size, config.seq_len, config.seed))
    size = sum(p.numel() for p in trainer.model.parameters())
    print(
        f"{corpus.name}: {corpus.train.numel():,} bytes; {size / 1e6:.1f} M parameters on {device}, {config.precision}"
    )

    def save(trainer: Trainer) -> None:
        if trainer.step % options.save_every == 0:
            trainer.save(options.output)

    rate = trainer.run(on_step=save)
    trainer.save(options.output)
    trainer.model.eval()
    held_out = corpus.held_out_bytes[: 1 << 18]
    bits = bits_per_byte(
        trainer.model, held_out, seq_len=config.seq_len, batch_size=config.batch_size, precision=config.precision
    )
    print(f"{rate:,.0f} tokens/s; held-out text: {bits:.3f} bits per byte; checkpoint: {options.output}")
    return 0


def _model_config(options: argparse.Namespace, vocab_size: int) -> YOCOConfig:
    overrides: dict[str, Any] = {"vocab_size": vocab_size}
    if options.self_decoder:
        overrides["self_decoder"] = options.self_decoder
    if options.config:
        try:
            fields = json.loads(options.config.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UsageError(f"--config {options.config} is not JSON: {error}") from error
        return YOCOConfig.from_dict(fields | overrides)
    return YOCOConfig.preset(options.preset or "160m", **overrides)


def _generate(options: argparse.Namespace) -> int:
    from .checkpoint import load_checkpoint
    from .data import END_OF_TEXT, VOCAB_SIZE
    from .training import autocast, default_precision

    device = _device(options)
    model = load_checkpoint(options.checkpoint, ops=options.ops, device=device).eval()
    if model.config.vocab_size != VOCAB_SIZE:
        raise UsageError(
            f"{options.checkpoint} has a vocabulary of {model.config.vocab_size}, this command writes bytes (256); "
            "use YOCOForCausalLM.generate with the model's tokenizer"
        )
    if options.prompt is not None:
        prompt = options.prompt.encode()
    elif str(options.prompt_file) == "-":
        prompt = sys.stdin.buffer.read()
    else:
        prompt = options.prompt_file.read_bytes()
    if not prompt:
        raise UsageError("the prompt is empty")

    def write(tokens: list[int | None]) -> None:
        if tokens[0]:  # neither None nor the end of the text
            sys.stdout.buffer.write(bytes(tokens))  # type: ignore[arg-type]
            sys.stdout.buffer.flush()

    sys.stdout.buffer.write(prompt)
    sys.stdout.buffer.flush()
    with autocast(model.device, options.precision or default_precision(device)):
        model.generate(
            [list(prompt)],
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            stop_tokens=[END_OF_TEXT],
            seed=options.seed,
            callback=write,
        )
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    return 0


def _convert(options: argparse.Namespace) -> int:
    from .convert import convert_checkpoint

    found = convert_checkpoint(options.source, options.target, to=options.to, source_format=options.source_format)
    print(f"{options.source} ({found}) -> {options.target} ({options.to})")
    return 0


def _bench(argv: list[str]) -> int:
    try:
        from . import benchmarks
    except ImportError as error:
        print(f"yoco-ext bench: error: the benchmarks are not in this installation ({error})", file=sys.stderr)
        return 2
    return benchmarks.main(argv)
