"""The evaluation on the real small model: tokens of the bundled texts, and needles that it does find."""

import pytest

from turboattention.errors import MissingDependencyError
from turboattention.evaluation.retrieval import needle_score
from turboattention.evaluation.texts import BUNDLED_TEXTS, windows
from turboattention.integrations.models import LoadedModel, load_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    try:
        return load_model("smollm2-135m")
    except MissingDependencyError as error:
        pytest.skip(str(error))


def test_bundled_texts_fill_the_context(smollm: LoadedModel) -> None:
    assert windows(smollm.tokenizer, BUNDLED_TEXTS, 8191, smollm.context_length).shape == (3, 8192)
    assert windows(smollm.tokenizer, BUNDLED_TEXTS, 8192).shape == (3, 8193)


def test_needles(smollm: LoadedModel) -> None:
    """The model finds about half of the needles; so does an 8-bit cache."""
    exact, int8 = (
        needle_score(smollm.model, smollm.tokenizer, policy, length=1024, seeds=[0]) for policy in (None, "int8")
    )
    assert exact.token_accuracy > 0.6
    assert abs(int8.token_accuracy - exact.token_accuracy) <= 0.1
