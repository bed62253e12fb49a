"""Convert between Hugging Face directories, Megatron distributed checkpoints and ModelOpt FP8, without a GPU.

    python tools/convert_checkpoint.py Qwen2.5-7B qwen-megatron                     # the trainer takes either
    python tools/convert_checkpoint.py qwen-megatron qwen-hf --workers 4 --verify
    python tools/convert_checkpoint.py runs/gsm8k/checkpoints/step_00000100 policy --like Qwen2.5-7B
    python tools/convert_checkpoint.py Qwen2.5-7B qwen-fp8 --to fp8                 # vllm serve qwen-fp8

The layout is no matter: a Megatron checkpoint is read at any. Memory stays at about one tensor a process. The target
appears when it is complete; run again after a kill, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dgpo.errors import UsageError
from megatron_dgpo.weights.convert import Job, convert, detect_kind


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face directory, Megatron or training checkpoint")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument("--to", choices=("hf", "megatron", "fp8"), help="default: hf from Megatron, megatron from hf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    parser.add_argument("--like", type=Path, help="take config and tokenizer from this Hugging Face directory")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the files")
    parser.add_argument("--file-bytes", type=int, help="largest output file; default: 5 GB, Megatron's 256 MB")
    parser.add_argument("--verify", action="store_true", help="compare what was written, or an existing target")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    options = parser.parse_args(arguments)
    for name in ("workers", "file_bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}={value}, expected 1 or more")
    try:
        kind = options.to or {"hf": "megatron", "megatron": "hf"}[detect_kind(options.source)]
        job = Job(options.source, options.target, kind, options.dtype, options.like, options.file_bytes)
        convert(job, options.workers, options.verify, options.force)
    except (UsageError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
