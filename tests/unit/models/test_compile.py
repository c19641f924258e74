"""``torch.compile`` takes the loss, the dense connectors and the LLM's layers as one graph each, without a break."""

import pytest
import torch

from nemo_mtbi.losses.head import Head
from nemo_mtbi.losses.imitation import imitation_loss
from nemo_mtbi.losses.objective import CachedTeacher, ImitationObjective
from nemo_mtbi.models.language_model import hidden_states
from nemo_mtbi.modules.connectors import ConvBottleneckConnector, StackMLPConnector
from tests.unit.models.test_packing import LENGTHS, given, random_llm

pytestmark = pytest.mark.unit
R, H, V, K = 10, 16, 50, 4


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("teacher", ["none", "online", "cached"])
def test_the_loss_is_one_graph(teacher):
    hidden, head, ids = torch.randn(R, H, requires_grad=True), Head(torch.randn(V, H)), torch.randint(0, V, (R,))
    given = {"online": {"teacher_hidden": torch.randn(R, H)}, "none": {}}.get(teacher)
    if given is None:
        given = {"cached_teacher": CachedTeacher(torch.randint(0, V, (R, K)), torch.randn(R, K).log_softmax(-1) - 0.1)}
    objective = ImitationObjective(w_kl=float(teacher != "none"))

    def loss(states):
        return imitation_loss(states, head, ids, objective, chunk_rows=4, **given).loss

    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert float(got) == pytest.approx(float(loss(hidden)), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(got, hidden), torch.autograd.grad(loss(hidden), hidden))


@pytest.mark.parametrize("make", [lambda: StackMLPConnector(H, 8, 5, 12), lambda: ConvBottleneckConnector(H, 8, 2, 6)])
def test_a_dense_connector_is_one_graph(make):
    connector, frames, lengths = make(), torch.randn(2, 20, H), torch.tensor([20, 13])

    def connect(features, valid):
        out = connector.connect(features, valid)
        return out.embeddings, out.lengths, out.centers

    got = torch.compile(connect, fullgraph=True, backend="aot_eager")(frames, lengths)
    torch.testing.assert_close(got, connect(frames, lengths))


@pytest.mark.slow
def test_a_packed_layer_of_the_llm_is_one_graph():
    llm = random_llm()
    inputs, beginnings = given(llm)
    expected = [hidden_states(llm, inputs, prefix, LENGTHS) for prefix in (None, beginnings)]
    for layer in llm.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    for prefix, states in zip((None, beginnings), expected, strict=True):
        torch.testing.assert_close(hidden_states(llm, inputs, prefix, LENGTHS), states)
