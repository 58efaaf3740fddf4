"""Every family passes one suite; a new one gets it by being listed in `tests/families.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import FAMILIES, FURTHER, REFUSED, take_through
from tsp.errors import ModelError

WORKING = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Pruned folders by family, filled by the tests."""
    return {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in FURTHER.split())) for name in WORKING]
)
def test_a_family_goes_through(name, tmp_path_factory, checkpoints):
    checkpoints[name] = take_through(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ModelError, match=re.escape(REFUSED[name])):
        take_through(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"], "nothing was written"


def test_at_least_forty_work():
    assert len(WORKING) >= 40


def test_the_checkpoints_load_with_transformers_alone(checkpoints):
    if not checkpoints:
        pytest.skip("needs the families' own tests in the same run")
    code = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'tsp']\n"
        "print('LOADED', len(sys.argv) - 1)\n"
    )
    folders = [str(path) for path in checkpoints.values()]
    done = subprocess.run([sys.executable, "-c", code, *folders], cwd="/", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"LOADED {len(folders)}" in done.stdout


def test_the_table_of_the_docs_is_that_of_the_list():
    text = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text()
    rows = dict(re.findall(r"^\| ([\w-]+) \| (works|refused) \|", text, re.MULTILINE))
    assert rows == {name: "refused" if name in REFUSED else "works" for name in FAMILIES}
