"""The fused imitation loss against the plain full-vocabulary formula (CE + T^2 * KL), values and
gradients.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from nemo_mtbi.errors import ConfigError
from nemo_mtbi.losses.imitation import CachedTeacher, Head, ImitationObjective, imitation_loss

R, H, V = 13, 8, 37
pytestmark = pytest.mark.parity


def plain(hidden, weight, ids, objective, teacher_logits, weights, bias=None, scale=1.0, softcap=None, top_k=None):
    """The formula, with every (R, V) tensor held. The top-k teacher is the bucketed distribution, written out."""

    def head(h):
        z = (h @ weight.t() + (0 if bias is None else bias)) * scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z = head(hidden)
    ce = cross_entropy(z, ids, reduction="none")
    if objective.w_kl == 0:
        return (weights * objective.w_ce * ce).sum()
    log_q, log_p = (log_softmax(t / objective.temperature, -1) for t in (z, teacher_logits))
    if top_k is not None and top_k < V:  # k = V is the full distribution
        keep = log_p.topk(top_k).indices

        def bucket(log_probs):
            mask = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, keep, True)
            rest = log_probs.masked_fill(mask, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([log_probs.gather(-1, keep), rest], -1)

        log_p, log_q = bucket(log_p), bucket(log_q)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    kl = {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
        "jensen_shannon": lambda: 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1),
    }[objective.divergence]()
    return (weights * (objective.w_ce * ce + objective.w_kl * objective.temperature**2 * kl)).sum()


def make(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(R, H, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=dtype).requires_grad_()
    teacher = torch.randn(R, H, generator=g, dtype=dtype)
    ids = torch.randint(V, (R,), generator=g)
    weights = torch.rand(R, generator=g, dtype=dtype) + 0.5
    return hidden, weight, bias, teacher, ids, weights


def test_a_rest_that_rounding_has_emptied_costs_little():
    """Of the reverse KL: a student with a hundredth in the rest pays for that, not a hundred nats."""
    hidden, weight, _, _, ids, _ = make()
    log_q = (hidden @ weight.t()).detach().log_softmax(-1)
    top = log_q.topk(5).indices
    cached = CachedTeacher(top, log_q.gather(-1, top).log_softmax(-1))  # all mass in five entries
    objective = ImitationObjective(0.0, 1.0, 1.0, "reverse_kl")
    loss = imitation_loss(hidden, Head(weight), ids, objective, cached_teacher=cached)
    rest = -torch.expm1(log_q.gather(-1, top).logsumexp(-1))
    assert float(loss.kl) < float((rest * (1 - math.log(1e-4))).sum()) < float(100 * rest.sum())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("known", [1, 5])
def test_what_fills_a_row_costs_no_more_than_an_empty_rest(divergence, known):
    """Of given answers, and of manifests of different top_k: entries that the teacher never said."""
    hidden, weight, _, teacher, ids, _ = make()
    log_p, top = (teacher @ weight.detach().t()).log_softmax(-1).topk(known)
    filled = torch.stack([torch.tensor([i for i in range(V) if i not in own][:3]) for own in top.tolist()])
    wide = torch.cat([top, filled], 1), torch.cat([log_p, torch.full(filled.shape, -100.0, dtype=log_p.dtype)], 1)
    objective = ImitationObjective(0.0, 1.0, 1.0, divergence)
    narrow, padded = (
        imitation_loss(hidden, Head(weight), ids, objective, cached_teacher=CachedTeacher(*rows))
        for rows in ((top, log_p), wide)
    )
    q = (hidden @ weight.t()).softmax(-1).gather(1, filled).sum(-1)  # as much as the least rest would cost them
    assert float(padded.kl) < float(narrow.kl) + float((q * -math.log(1e-4)).sum())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 5, V])
@pytest.mark.parametrize("shape", ["plain", "bias", "scaled", "scaled_softcapped"])
def test_value_and_gradients_equal_the_plain_formula(divergence, temperature, top_k, shape):
    hidden, weight, bias, teacher, ids, weights = make()
    bias = bias if shape == "bias" else None
    scale, softcap = (0.7 if "scaled" in shape else 1.0), (3.0 if shape == "scaled_softcapped" else None)
    objective = ImitationObjective(0.4, 1.3, temperature, divergence)
    teacher_weight = weight.detach().clone()
    teacher_logits = (teacher @ teacher_weight.t() + (0 if bias is None else bias.detach())) * scale
    if softcap:
        teacher_logits = softcap * torch.tanh(teacher_logits / softcap)
    expected = plain(hidden, weight, ids, objective, teacher_logits, weights, bias, scale, softcap, top_k)
    wanted = [hidden, weight] + ([bias] if bias is not None else [])
    expected_grads = torch.autograd.grad(expected, wanted)
    if top_k is None:
        kind = {"teacher_hidden": teacher}
    else:
        log_p, keep = log_softmax(teacher_logits / temperature, -1).topk(top_k)
        kind = {"cached_teacher": CachedTeacher(keep, log_p)}
    got = imitation_loss(
        hidden, Head(weight, bias, scale, softcap), ids, objective, token_weights=weights, chunk_rows=4, **kind
    )
    torch.testing.assert_close(got.loss, expected)
    for a, b in zip(torch.autograd.grad(got.loss, wanted), expected_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradcheck_in_float64(temperature):
    hidden, weight, bias, teacher, ids, weights = make()
    objective = ImitationObjective(1.0, 0.5, temperature)
    # The online teacher shares lm_head and is constant, so its head is fixed here while finite differences move ours.
    fixed = Head(weight.detach().clone(), bias.detach().clone())

    def loss(h, w, b):
        return imitation_loss(
            h,
            Head(w, b),
            ids,
            objective,
            teacher_hidden=teacher,
            teacher_head=fixed,
            token_weights=weights,
            chunk_rows=5,
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    hidden, weight, _, teacher, ids, weights = make()
    objective = ImitationObjective(1.0, 1.0, 1.0)
    low = [t.detach().to(dtype) for t in (hidden, weight, teacher)]
    exact = plain(low[0].double(), low[1].double(), ids, objective, low[2].double() @ low[1].double().t(), weights)
    got = imitation_loss(low[0], Head(low[1]), ids, objective, teacher_hidden=low[2], token_weights=weights.float())
    torch.testing.assert_close(got.loss.double(), exact, rtol=tolerance, atol=0)


def test_top_k_converges_to_the_full_teacher():
    hidden, weight, _, teacher, ids, _ = make()
    objective = ImitationObjective(0.0, 1.0, 1.5)
    full = imitation_loss(hidden, Head(weight), ids, objective, teacher_hidden=teacher).loss
    log_p = log_softmax(teacher @ weight.detach().t() / 1.5, -1)
    errors = []
    for k in (1, 4, 16, V):
        top, keep = log_p.topk(k)
        cached = imitation_loss(hidden, Head(weight), ids, objective, cached_teacher=CachedTeacher(keep, top)).loss
        errors.append(float((full - cached).detach()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0  # merging buckets can only lose divergence
    assert abs(errors[-1]) < 1e-9


def test_agreement_and_sums():
    hidden, weight, _, _, _, _ = make()
    best = (hidden @ weight.t()).argmax(-1)
    wrong = (best + 1) % V
    head, objective = Head(weight), ImitationObjective(1.0, 0.0)
    assert imitation_loss(hidden, head, best, objective).agreed.all()
    loss = imitation_loss(hidden, head, wrong, objective)
    assert not loss.agreed.any()
    torch.testing.assert_close(loss.per_token.sum(), loss.loss)
    torch.testing.assert_close(loss.ce, cross_entropy(hidden @ weight.t(), wrong, reduction="sum"))


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_tokens_that_tie_the_first_is_the_most_likely(top_k, temperature):
    """Low-precision logits tie often; greedy decoding takes the first. With and without the direct path."""
    weight = torch.eye(4)[[0, 1, 1, 2]]  # tokens 1 and 2 always tie
    hidden = torch.tensor([[0.0, 3.0, 0.0, 0.0]] * 2)
    teacher = {"teacher_hidden": hidden}
    if top_k:
        teacher = {"cached_teacher": CachedTeacher(torch.tensor([[1, 2]] * 2), torch.tensor([[0.6, 0.3]] * 2).log())}
    objective = ImitationObjective(temperature=temperature)
    found = imitation_loss(hidden, Head(weight), torch.tensor([1, 2]), objective, **teacher)
    assert found.agreed.tolist() == [True, False]


def test_two_teachers_are_refused():
    hidden, cached = torch.zeros(1, 4), CachedTeacher(torch.tensor([[1]]), torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="exactly one teacher"):
        imitation_loss(
            hidden,
            Head(torch.eye(4)),
            torch.tensor([1]),
            ImitationObjective(),
            teacher_hidden=hidden,
            cached_teacher=cached,
        )


def test_no_response_token_is_a_zero_loss():
    head = Head(torch.randn(V, H))
    loss = imitation_loss(torch.zeros(0, H), head, torch.zeros(0, dtype=torch.long), ImitationObjective(1.0, 0.0))
    assert loss.loss == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"divergence": "l2"}, "Unknown divergence 'l2'"),
        ({"w_ce": -1.0}, "weights must be >= 0"),
        ({"temperature": 0.0}, "must be positive"),
    ],
)
def test_bad_objectives_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImitationObjective(**settings)


def test_kl_without_a_teacher_is_refused():
    hidden, weight, _, _, ids, _ = make()
    with pytest.raises(ConfigError, match="exactly one teacher"):
        imitation_loss(hidden, Head(weight), ids, ImitationObjective())
