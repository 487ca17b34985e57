"""`make gpu-check`: build for this machine's GPU, test on it, look for bad memory accesses, measure; within 8 minutes.

`python -m benchmarks.gpu_check [--out build/gpu] [--seconds 480]`

Needs a torch with CUDA, nvcc, pytest and ninja in the running interpreter's environment, and installs nothing. Writes
FOLDER/{build,tests,benchmarks,moe,model,memcheck,racecheck}.log, {ops,moe,model}.{json,md} and summary.md. The exit
status is that of the build, the tests and the benchmarks; compute-sanitizer counts where it works.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SANITIZED = "test_kernel_equals_reference and float32"
#: What compute-sanitizer says where it cannot work: a failure of the tool, not of the kernels.
UNSUPPORTED = ("Device not supported", "Unable to", "Failed to initialize", "Internal Sanitizer Error")


@dataclass
class Step:
    name: str
    status: str
    seconds: float


def architecture() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


class Check:
    def __init__(self, out: Path, seconds: float):
        self.out, self.end, self.steps = out, time.monotonic() + seconds, list[Step]()

    def run(self, name: str, command: list[str], limit: float, **variables: str) -> bool:
        """One step: its output goes to a log, its outcome to the summary. Returns whether it passed."""
        started = time.monotonic()
        limit = min(limit, self.end - started)
        log = self.out / f"{name}.log"
        if limit < 5:
            self.note(name, "not run: out of time", 0.0)
            return False
        with log.open("w") as file:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=os.environ | variables, stdout=file, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
                status = "passed" if code == 0 else f"FAILED (exit status {code})"
            except subprocess.TimeoutExpired:
                status = f"FAILED (not done in {limit:.0f} s)"
        self.note(name, f"{status}: {last_line(log)}", time.monotonic() - started)
        return status == "passed"

    def note(self, name: str, status: str, seconds: float) -> None:
        self.steps.append(Step(name, status, seconds))
        print(f"{name:<12}{seconds:>6.0f} s  {status}", flush=True)

    def sanitize(self, tool: str, limit: float) -> bool:
        if shutil.which("compute-sanitizer") is None:
            self.note(tool, "not run: compute-sanitizer is not installed", 0.0)
            return True
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_every_op.py", "-k"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7", *pytest, SANITIZED]
        # Freed blocks go back to the driver, so that an access outside a tensor is outside an allocation.
        passed = self.run(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        text = (self.out / f"{tool}.log").read_text(errors="replace") if self.steps[-1].seconds else ""
        if not passed and any(phrase in text for phrase in UNSUPPORTED):
            self.steps[-1].status = "not run: compute-sanitizer does not work on this machine"
            return True
        return passed


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip(" =") if lines else "no output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=480)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"[gpu-check] device: expected a GPU that torch {torch.__version__} can use, found none")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check, python = Check(out, args.seconds), sys.executable
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    if not check.run("build", build, 240, FERRUM_CUDA="1", FERRUM_CUDA_ARCHS=architecture()):
        raise SystemExit(1)
    parallel = ["-n", "4"] if shutil.which("pytest") and has("xdist") else []
    passed = check.run("tests", [python, "-m", "pytest", "-q", *parallel, "tests/cuda"], 150)
    passed &= check.run("benchmarks", [python, "-m", "benchmarks.gpu", "--out", str(out), "--seconds", "120"], 180)
    passed &= check.run("moe", [python, "-m", "benchmarks.gpu_moe", "--out", str(out), "--seconds", "40"], 60)
    model = [python, "-m", "benchmarks.gpu_model", "--out", str(out), "--candidates", "graph", "eager"]
    passed &= check.run("model", [*model, "--seconds", "60"], 100)
    passed &= check.sanitize("memcheck", 90)
    passed &= check.sanitize("racecheck", 90)
    lines = [f"{step.name:<12}{step.seconds:>6.0f} s  {step.status}" for step in check.steps]
    (out / "summary.md").write_text("\n".join(["```", *lines, "```", ""]))
    raise SystemExit(0 if passed else 1)


def has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


if __name__ == "__main__":
    main()
