"""Memory and speed of tools/convert_checkpoint.py on a generated model, by default of 9 GB on disk.

    python tools/bench_convert.py FOLDER --layers 16

Memory is RssAnon, sampled every 5 ms in the process that converts: the page cache of mapped files is not counted,
because the kernel takes it back when it wants to. Files are flushed to disk within the time, as they are in that of
the plain copy that speeds are to be compared with.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import threading
import time
from pathlib import Path

import torch

from megatron_dgpo.complete_folder import flush
from megatron_dgpo.weights.architectures import read_architecture
from megatron_dgpo.weights.convert import Job, convert
from megatron_dgpo.weights.directory import FILE_BYTES, SafetensorsWriter, group


class PeakMemory:
    """`bytes`: the most anonymous memory of this process while the context was open."""

    def __enter__(self) -> PeakMemory:
        self.bytes, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def generate(folder: Path, layers: int, **config) -> Path:
    """A bfloat16 Llama with the widths of Llama-3-8B unless `config` says otherwise, a tensor at a time."""
    folder.mkdir(parents=True)
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"} | widths
    settings |= {"vocab_size": 128256, "max_position_embeddings": 8192, "num_hidden_layers": layers} | config
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    empty = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for name, shape in read_architecture(folder).hf_shapes.items()
    }
    files = group(list(empty), lambda name: empty[name].nbytes, FILE_BYTES)
    writer = SafetensorsWriter(folder, files, lambda name: {name: empty[name]})
    for number in range(len(files)):
        writer.write(number, lambda name: [(name, torch.randn(empty[name].shape, dtype=torch.bfloat16))])
    writer.finish()
    return folder


def copy(source: Path, target: Path) -> float:
    """Seconds that it takes to copy the files and flush them to disk; the copy is removed."""
    start = time.monotonic()
    shutil.copytree(source, target)
    flush(target.iterdir())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not exist; removed afterwards")
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    try:
        source = generate(options.folder / "source", options.layers)
        size = sum(file.stat().st_size for file in source.iterdir())
        largest = 2 * max(torch.Size(shape).numel() for shape in read_architecture(source).hf_shapes.values())
        bound = 2 * largest + 2**30
        print(f"model {size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
        seconds = copy(source, options.folder / "copy")
        print(f"plain copy: {seconds:.0f} s, {size / seconds / 1e9:.2f} GB/s")
        megatron, back, fp8 = (options.folder / name for name in ("megatron", "back", "fp8"))
        jobs = [Job(source, megatron, "megatron"), Job(megatron, back, "hf"), Job(source, fp8, "fp8")]
        for job in jobs:
            for verify in (False, True):
                with PeakMemory() as peak:
                    start = time.monotonic()
                    convert(job, verify=verify)
                    seconds = time.monotonic() - start
                verb = "verify" if verify else "convert"
                rate = size / seconds / 1e9
                print(f"{verb} to {job.kind}: peak {peak.bytes / 1e9:.2f} GB, {seconds:.0f} s, {rate:.2f} GB/s")
        for file in source.iterdir():
            assert filecmp.cmp(file, back / file.name, shallow=False), file
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
