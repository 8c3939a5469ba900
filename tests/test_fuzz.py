"""What fuzzing starts from, and every input that once failed, through the targets of fuzz.py; ``make fuzz`` goes on from there."""

import fuzz
import pytest

pytest.importorskip("torch")
pytest.importorskip("yaml")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_past_failures(name):
    past = [path.read_bytes() for path in sorted((fuzz.CORPUS / name).glob("*"))]
    for data in [*fuzz.seeds()[name], *past]:
        for cut in (len(data), len(data) // 2, 0):
            fuzz.timed(name, data[:cut])


def test_targets_judge():
    """A target fails for any other exception than a refusal that names the file."""

    def name_missing():
        raise ValueError("no")

    with pytest.raises(AssertionError):
        fuzz.refused(name_missing, "file.pth")
    with pytest.raises(KeyError):
        fuzz.refused(lambda: {}["a"])
