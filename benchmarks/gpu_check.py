"""`make gpu-check`: build for this machine's GPU, test on it, measure, look for bad memory accesses; within 8 minutes.

`python -m benchmarks.gpu_check [--out build/gpu] [--seconds 480] [--commit ID]`

Needs a torch with CUDA, nvcc, pytest and ninja in the running interpreter's environment, and installs nothing. Writes
FOLDER/{ops,moe,model}.{json,md}, check.log and summary.md. The exit status is that of the build, the tests and the
benchmarks; compute-sanitizer counts where it works and there is time for it.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
#: The most seconds of each step; together more than there are, for the build and the tests seldom take theirs.
LIMITS = {"build": 240, "tests": 150, "benchmarks": 150, "moe": 60, "model": 80, "memcheck": 60, "racecheck": 45}
#: What a step that ends by itself needs for start and end.
OVERHEAD = 30
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


def tools_path() -> str:
    """PATH with the interpreter's own tools first (ninja) and the CUDA toolkit's last."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return os.pathsep.join(folders)


class Check:
    def __init__(self, out: Path, seconds: float):
        self.log, self.end, self.steps = out / "check.log", time.monotonic() + seconds, list[Step]()
        self.log.write_text("")

    def seconds_for(self, name: str) -> float:
        return min(LIMITS[name], self.end - time.monotonic())

    def run(self, name: str, command: list[str], **variables: str) -> bool:
        """One step: its output goes to the log, its outcome to the summary. Returns whether it passed."""
        started, limit = time.monotonic(), self.seconds_for(name)
        if limit < 5:
            self.note(name, "not run: out of time", 0.0)
            return False
        environment = os.environ | {"PATH": tools_path(), "PYTHONUNBUFFERED": "1"} | variables
        with self.log.open("a") as file:
            print(f"==== {name}: {' '.join(command)}", file=file, flush=True)
            output = {"stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **output)
            try:
                code = process.wait(limit)
                status = "passed" if code == 0 else f"FAILED (exit status {code})"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its workers too, which hold the GPU
                process.wait()
                status = f"FAILED (not done in {limit:.0f} s)"
        self.note(name, f"{status}: {last_line(self.output(name))}", time.monotonic() - started)
        return status == "passed"

    def output(self, name: str) -> str:
        """What the step printed."""
        return self.log.read_text(errors="replace").split(f"==== {name}: ")[-1].partition("\n")[2]

    def note(self, name: str, status: str, seconds: float) -> None:
        self.steps.append(Step(name, status, seconds))
        print(f"{name:<12}{seconds:>6.0f} s  {status}", flush=True)

    def sanitize(self, tool: str) -> bool:
        """Whether the tool found nothing, or could not look."""
        program, seconds = shutil.which("compute-sanitizer", path=tools_path()), self.seconds_for(tool) - OVERHEAD
        if program is None or seconds < 5:
            reason = "compute-sanitizer is not installed" if program is None else "out of time"
            self.note(tool, f"not run: {reason}", 0.0)
            return True
        script = [sys.executable, "-m", "tests.cuda.sanitize", "--seconds", f"{seconds:.0f}"]
        # Freed blocks go back to the driver, so that an access outside a tensor is outside an allocation.
        command = [program, "--tool", tool, "--error-exitcode", "7", *script]
        passed = self.run(tool, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if not passed and any(phrase in self.output(tool) for phrase in UNSUPPORTED):
            self.steps[-1].status = "not run: compute-sanitizer does not work on this machine"
            return True
        return passed

    def summary(self) -> str:
        lines = [f"{step.name:<12}{step.seconds:>6.0f} s  {step.status}" for step in self.steps]
        return "\n".join(["```", *lines, "```", ""])


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip(" =")[:200] if lines else "no output"


def check_all(check: Check, commit: str) -> bool:
    python = sys.executable
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    if not check.run("build", build, FERRUM_CUDA="1", FERRUM_CUDA_ARCHS=architecture()):
        return False
    # A worker holds a CUDA context and compiles on the host: half the cores.
    workers = max(2, min(8, (os.cpu_count() or 2) // 2))
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") is not None else []
    passed = check.run("tests", [python, "-m", "pytest", "-q", *parallel, "tests/cuda"])
    seconds = max(0.0, check.seconds_for("benchmarks") - OVERHEAD)
    measure = ["benchmarks.gpu", "--out", str(check.log.parent), "--seconds", f"{seconds:.0f}", "--commit", commit]
    passed &= check.run("benchmarks", [python, "-m", *measure])
    moe = ["benchmarks.gpu_moe", "--out", str(check.log.parent), "--seconds", "40"]
    passed &= check.run("moe", [python, "-m", *moe])
    seconds = max(0.0, check.seconds_for("model") - OVERHEAD)
    model = ["benchmarks.gpu_model", "--out", str(check.log.parent), "--candidates", "graph", "eager"]
    passed &= check.run("model", [python, "-m", *model, "--seconds", f"{seconds:.0f}"])
    passed &= check.sanitize("memcheck")
    passed &= check.sanitize("racecheck")
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--commit", default="", help="of the sources, for where git does not know it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"[gpu-check] device: expected a GPU that torch {torch.__version__} can use, found none")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check = Check(out, args.seconds)
    if args.commit:
        os.environ["GPU_COMMIT"] = args.commit  # for every step
    passed = check_all(check, args.commit)
    (out / "summary.md").write_text(check.summary())
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
