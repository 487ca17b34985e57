"""The README's first example runs as it stands, from the repository's root."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("block", range(1))
def test_python_example_runs(block, monkeypatch, tmp_path, capsys):
    text = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[block]
    code = code.replace('"examples/', f'"{ROOT}/examples/')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert "Once" in capsys.readouterr().out
