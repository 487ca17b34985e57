"""Every CUDA kernel on the registry's samples and nothing else, for compute-sanitizer to watch.

`compute-sanitizer --tool memcheck python -m tests.cuda.sanitize [--seconds 60]`
"""

import argparse
import time

import torch

import ferrum_ops
from ferrum_ops.testing.timing import torch_op
from tests.cuda.test_every_op import WITH_KERNEL, strided_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="start no further sample after this time")
    args = parser.parse_args()
    end, done, left = time.monotonic() + args.seconds, 0, 0
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for name in sorted(WITH_KERNEL):
            torch.manual_seed(0)
            for sample in ferrum_ops.OPS[name].inputs("cpu", dtype):
                if time.monotonic() > end:
                    left += 1
                    continue
                torch_op(name)(*strided_on("cuda", sample))
                torch.cuda.synchronize()
                done += 1
    print(f"{done} samples of {len(WITH_KERNEL)} ops ran, {left} were left out for want of time")


if __name__ == "__main__":
    main()
