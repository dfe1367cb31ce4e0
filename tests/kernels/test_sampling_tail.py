"""The sampling tail: kernels against plain torch, stop conditions, and rows that fail or are not there.

``TRITON_INTERPRET=1`` runs the kernels without a GPU, on small vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from penstock.kernels.batch.state import LIVE, NOT_LIVE, ArenaLayout, BatchState
from penstock.kernels.dispatch import INTERPRETED
from penstock.kernels.sampling import tail
from penstock.kernels.sampling.reference import TILE, keep_min_p, keep_top_k, keep_top_p
from penstock.kernels.sampling.tail import FAILED, INERT, MADE, TailOutput, sample_step, sample_step_reference
from support.devices import on_every_device, on_every_kernel

INF, NAN = float("inf"), float("nan")
POISON = -77
"""Where nothing was written."""


@pytest.fixture
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program goes over many tiles, as in a large batch."""
    if INTERPRETED or device == "cuda":
        monkeypatch.setattr("penstock.kernels.sampling.launch.PROGRAMS", 2)


@dataclass
class Batch:
    """A state whose slots are all live, unfiltered, greedy and far from their ends, and its output."""

    state: BatchState
    out: TailOutput
    slots: Tensor

    @classmethod
    def of(cls, rows: int, vocab: int, device: str) -> Batch:
        state = BatchState.allocate(ArenaLayout(rows, 2, rows), torch.device(device), scratch_block=0)
        out = TailOutput.allocate(rows, vocab, torch.device(device))
        for scratch in (out.weights, out.floors, out.peaks, out.candidates):
            scratch.fill_(NAN)
        for integers in (out.tokens, out.status, out.cursors):
            integers.fill_(POISON)
        live = slice(0, rows)
        state.live[live] = LIVE
        state.computed[live] = torch.arange(rows).to(device).int() * 3
        state.max_tokens[live] = 1000
        state.top_p[live] = 1.0
        state.seeds[live] = torch.arange(2 * rows).to(device).int().view(rows, 2) * 7919
        return cls(state, out, torch.arange(rows, dtype=torch.int32, device=device))

    def twin(self, vocab: int) -> Batch:
        """Another one in the same state."""
        twin = Batch.of(self.slots.numel(), vocab, str(self.slots.device))
        twin.state.arena.copy_(self.state.arena)
        return twin

    def step(self, logits: Tensor, *, filtered: bool = True) -> list[tuple[int, int]]:
        """(token, status) of each row."""
        sample_step(logits.clone(), self.slots, self.state, self.out, filtered=filtered)
        count = self.slots.numel()
        return list(zip(self.out.tokens[:count].tolist(), self.out.status[:count].tolist(), strict=True))


def randomize(state: BatchState, rows: int, vocab: int, generator: torch.Generator) -> None:
    """Every mixture of parameters, some of them extreme."""

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    def put(column: Tensor, values: Tensor) -> None:
        column[:rows] = values.to(column.dtype).to(column.device)

    uniform = torch.rand(rows, generator=generator)
    put(state.temperature, pick(0.0, 0.3, 0.7, 1.0, 1.0, 1.5, 20.0, 1e-30) * (0.5 + uniform))
    put(state.top_k, pick(0, 0, 1, 2, 20, 50, 300, vocab - 1, vocab, 2**31 - 129))
    put(state.top_p, torch.where(uniform < 0.4, 1.0, pick(1e-9, 0.5, 0.8, 0.9, 0.95, 0.99, 0.9999)))
    put(state.min_p, pick(0.0, 0.0, 0.0, 0.01, 0.1, 1.0))
    put(state.seeds, torch.randint(-(2**31), 2**31 - 1, (rows, 2), generator=generator))
    put(state.sample_index, torch.randint(-3, 9, (rows,), generator=generator))
    put(state.computed, torch.randint(0, 2**17, (rows,), generator=generator))
    put(state.outputs, torch.randint(0, 6, (rows,), generator=generator))
    put(state.min_tokens, torch.randint(0, 6, (rows,), generator=generator))
    put(state.max_tokens, torch.randint(1, 12, (rows,), generator=generator))
    put(state.stop_count, pick(0, 0, 1, 5, 64))
    put(state.stop_ids, torch.randint(-5, vocab + 50, (rows, state.stop_ids.shape[1]), generator=generator))
    put(state.live, (torch.rand(rows, generator=generator) < 0.95).int())


def random_logits(rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """float32: from flat to peaked rows, some of few values, hence with many ties."""
    logits = torch.randn(rows, vocab, generator=generator) * (torch.rand(rows, 1, generator=generator) * 2).exp()
    logits[::5] = (logits[::5] * 2).round()
    logits[3::11] = logits[3::11, :1]
    return logits


def kept(batch: Batch, logits: Tensor) -> Tensor:
    """Which entries the reference's filters leave, bool [rows, vocabulary]."""
    rows = slice(0, logits.shape[0])
    state = batch.state
    warmth = state.temperature[rows]
    left = keep_top_p(keep_top_k(logits, state.top_k[rows].long()), state.top_p[rows], warmth)
    return keep_min_p(left, state.min_p[rows], warmth) > -INF


@on_every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("filtered", "candidates"), [(False, 4096), (True, 4096), (True, 32)], ids=["plain", "filtered", "narrow"]
)
def test_the_kernels_equal_the_reference(
    device: str, dtype: torch.dtype, filtered: bool, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, statuses and the whole state; ``narrow``: hardly any row's candidates can be set apart."""
    monkeypatch.setattr(tail, "CANDIDATES", candidates)
    if candidates < tail.PEAK and device == "cpu":
        monkeypatch.setattr("penstock.kernels.sampling.launch.PROGRAMS", 40)
    cases = [(32, 2051), (10, 5003)]
    if device == "cuda":
        cases = [(256, 151_936), (256, 151_936), (256, 128_256), (250, 32_003)]
    for seed, (rows, vocab) in enumerate(cases):
        generator = torch.Generator().manual_seed(seed)
        batch = Batch.of(rows, vocab, device)
        randomize(batch.state, rows, vocab, generator)
        logits = random_logits(rows, vocab, generator).to(dtype).to(device)
        if not filtered:
            batch.state.top_k.zero_()
            batch.state.top_p.fill_(1.0)
            batch.state.min_p.zero_()
        twin = batch.twin(vocab)
        batch.step(logits, filtered=filtered)
        sample_step_reference(logits, twin.slots, twin.state, twin.out, filtered=filtered)
        assert torch.equal(batch.out.status, twin.out.status)
        assert {MADE} <= set(batch.out.status.tolist()) <= {INERT, MADE}
        # A GPU's exponentials and logarithms differ from torch's in the last bits: a tie may fall the other way.
        differ = (batch.out.tokens != twin.out.tokens).nonzero().squeeze(1)
        assert differ.numel() <= rows // 200
        arenas = torch.stack((batch.state.arena, twin.state.arena))
        assert int((arenas[0] != arenas[1]).sum()) <= 2 * differ.numel()


@on_every_kernel
@pytest.mark.parametrize("candidates", [32, 4096])
def test_floors_leave_what_the_reference_leaves(device: str, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "CANDIDATES", candidates)
    rows, vocab = (24, 5003) if device == "cpu" else (256, 151_936)
    generator = torch.Generator().manual_seed(11)
    batch = Batch.of(rows, vocab, device)
    randomize(batch.state, rows, vocab, generator)
    batch.state.temperature[:rows] += 0.2
    batch.state.min_tokens.zero_()
    batch.state.live[:rows] = LIVE
    logits = random_logits(rows, vocab, generator).to(device)
    expected = kept(batch, logits)
    batch.step(logits)
    left = logits >= batch.out.floors[:, None]
    # The last token of a flat nucleus may be one further when a sum of masses differs in its last bits.
    assert int((left != expected).any(dim=1).sum()) <= rows // 50
    assert int((left != expected)[:, :].sum(dim=1).max()) <= 1


@on_every_kernel
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_tile_weighs_the_logarithm_of_its_sum(device: str, dtype: torch.dtype) -> None:
    """Against torch.logsumexp in float64, times the temperature; the best logit of a greedy row; nothing left: -inf."""
    vocab = 1900
    generator = torch.Generator().manual_seed(2)
    batch = Batch.of(6, vocab, device)
    warmth = torch.tensor([0.0, 0.1, 0.7, 1.0, 5.0, 1e-30], device=device)
    batch.state.temperature[:6] = warmth
    logits = (torch.randn(6, vocab, generator=generator) * 4).to(dtype).to(device)
    logits[:, 512:1024] = -3.0
    batch.step(logits, filtered=False)
    padded = torch.nn.functional.pad(logits.double(), (0, 4 * TILE - vocab), value=-INF).view(6, 4, TILE)
    expected = padded.amax(dim=-1)
    drawn = warmth[1:5, None].double()
    expected[1:5] = drawn * torch.logsumexp(padded[1:5] / drawn[..., None], dim=-1)
    torch.testing.assert_close(batch.out.weights.double(), expected, rtol=1e-5, atol=1e-5)
    batch.state.top_k[3] = 1
    batch.state.live[:6] = LIVE
    batch.step(logits, filtered=True)
    peaks = padded[3].amax(dim=-1)
    assert torch.equal(batch.out.weights[3] > -INF, peaks == peaks.max())


@on_every_device
@pytest.mark.usefixtures("few_programs")
def test_extreme_rows(device: str) -> None:
    """All logits equal, both zeros, and filters that leave one token."""
    vocab = 2503
    batch = Batch.of(7, vocab, device)
    batch.state.temperature[:7] = torch.tensor([0.0, 1.0, 1.0, 1.0, 1e-38, 1.0, 1.0], device=device)
    batch.state.top_k[:7] = torch.tensor([0, 2, 0, 1, 0, 0, 0], dtype=torch.int32, device=device)
    batch.state.top_p[:7] = torch.tensor([1.0, 0.5, 1e-9, 1.0, 1.0, 1.0, 1e-30], device=device)
    batch.state.min_p[5] = 1.0
    logits = torch.full((7, vocab), 4.0, device=device)
    logits[1] = -0.0
    logits[1, [7, 500]] = torch.tensor([0.0, 1.0], device=device)
    logits[3:, 2000] = 5.0
    made = [token for token, status in batch.step(logits) if status == MADE]
    assert len(made) == 7
    assert made[0] == 0
    assert made[3:] == [2000] * 4
    if INTERPRETED or device == "cuda":
        assert batch.out.floors.tolist() == [-INF, 0.0, 4.0, 5.0, -INF, 5.0, 5.0]


@on_every_kernel
@pytest.mark.parametrize("candidates", [32, 4096])
def test_filters_do_not_count_what_is_forbidden(device: str, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two best tokens may not be chosen yet: floors are those of a row without them."""
    monkeypatch.setattr(tail, "CANDIDATES", candidates)
    vocab = 1030
    batch = Batch.of(4, vocab, device)
    state = batch.state
    logits = torch.linspace(0.0, 1.0, vocab, device=device).repeat(4, 1)
    logits[:, [600, 8, 9, 10]] = torch.tensor([40.0, 39.0, 20.0, 19.5], device=device)
    state.temperature[:4] = 1.0
    state.stop_ids[:4, :2] = torch.tensor([600, 8], dtype=torch.int32, device=device)
    state.stop_count[:4] = 2
    state.min_tokens[:4] = torch.tensor([1, 1, 1, 0], dtype=torch.int32, device=device)
    state.top_k[:4] = torch.tensor([2, 0, 0, 2], dtype=torch.int32, device=device)
    state.top_p[:4] = torch.tensor([1.0, 0.9, 0.5, 1.0], device=device)
    made = [token for token, _ in batch.step(logits)]
    assert batch.out.floors.tolist() == [19.5, 19.5, 20.0, 39.0]
    assert made[0] in (9, 10)
    assert made[1] in (9, 10)
    assert made[2] == 9
    assert made[3] in (600, 8)


@on_every_device
@pytest.mark.parametrize("filtered", [False, True])
def test_a_slot_ends_at_a_stop_id_and_at_its_last_token(device: str, filtered: bool) -> None:
    batch = Batch.of(5, 300, device)
    state = batch.state
    best = torch.tensor([10, 11, 12, 13, 14])
    logits = torch.zeros(5, 300, device=device)
    logits[torch.arange(5), best] = 9.0
    state.stop_ids[:5, :3] = torch.tensor([7, 11, 12], dtype=torch.int32, device=device)
    state.stop_count[:5] = torch.tensor([3, 3, 2, 0, 0], dtype=torch.int32, device=device)
    state.max_tokens[3], state.max_tokens[4] = 1, 2
    before = state.computed.tolist()
    assert batch.step(logits, filtered=filtered) == [(int(token), MADE) for token in best]
    assert state.live.tolist() == [LIVE, NOT_LIVE, LIVE, NOT_LIVE, LIVE, NOT_LIVE]
    assert state.last_token[:5].tolist() == best.tolist()
    assert state.computed[:5].tolist() == [computed + 1 for computed in before[:5]]
    assert state.outputs[:5].tolist() == [1] * 5
    assert batch.step(logits, filtered=filtered) == [(10, MADE), (0, INERT), (12, MADE), (0, INERT), (14, MADE)]
    assert state.live.tolist() == [LIVE, NOT_LIVE, LIVE, NOT_LIVE, NOT_LIVE, NOT_LIVE]
    assert state.outputs[:5].tolist() == [2, 1, 2, 1, 2]


@on_every_device
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_ids_wait_for_min_tokens(device: str, temperature: float) -> None:
    """A greedy row takes its third best, a drawn one never a stop id, and filters do not count what is forbidden."""
    batch = Batch.of(4, 300, device)
    state = batch.state
    logits = torch.zeros(4, 300, device=device)
    logits[:, [5, 250, 8]] = torch.tensor([30.0, 40.0, 20.0], device=device)
    state.temperature[:4] = temperature
    state.top_k[:4] = 1
    state.stop_ids[:4, :2] = torch.tensor([250, 5], dtype=torch.int32, device=device)
    state.stop_count[:4] = 2
    state.min_tokens[:4] = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device)
    state.outputs[:4] = 1
    tokens = [token for token, _ in batch.step(logits)]
    assert tokens == [250, 250, 8, 8]
    assert state.live[:4].tolist() == [NOT_LIVE, NOT_LIVE, LIVE, LIVE]
    assert [token for token, _ in batch.step(logits)] == [0, 0, 250, 8]


@on_every_device
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of arithmetic with NaN
def test_a_row_that_is_not_finite_fails_alone(device: str, filtered: bool) -> None:
    rows, vocab = 6, 2050
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, vocab, generator=generator).to(device)
    batch = Batch.of(rows, vocab, device)
    batch.state.temperature[:rows] = 1.0
    batch.state.top_p[:rows] = 0.9 if filtered else 1.0
    twin = batch.twin(vocab)
    expected = twin.step(logits, filtered=filtered)
    for row, entry, value in ((1, 0, NAN), (2, 2049, INF), (4, 1024, -INF)):
        logits[row, entry] = value
    untouched = batch.state.computed.tolist()
    made = batch.step(logits, filtered=filtered)
    assert [made[row] for row in (0, 3, 5)] == [expected[row] for row in (0, 3, 5)]
    assert [made[row] for row in (1, 2, 4)] == [(0, FAILED)] * 3
    assert batch.state.live.tolist() == [LIVE, NOT_LIVE, NOT_LIVE, LIVE, NOT_LIVE, LIVE, NOT_LIVE]
    assert [batch.state.computed[row].item() for row in (1, 2, 4)] == [untouched[row] for row in (1, 2, 4)]
    assert [status for _, status in batch.step(logits, filtered=filtered)] == [1, 0, 0, 1, 0, 1]


@on_every_device
def test_rows_that_pad_a_batch_are_inert(device: str) -> None:
    """NaN in their logits means nothing, and the extra slot stays as it is."""
    batch = Batch.of(3, 200, device)
    batch.state.top_p[:3] = 0.5
    extra = batch.state.layout.slots
    batch.slots = torch.tensor([extra, 1, extra], dtype=torch.int32, device=device)
    logits = torch.full((3, 200), NAN, device=device)
    logits[1] = 0.0
    before = batch.state.arena.clone()
    assert batch.step(logits) == [(0, INERT), (0, MADE), (0, INERT)]
    changed = (batch.state.arena != before).nonzero().squeeze(1).tolist()
    offset = batch.state.layout.offset
    assert changed == [offset("computed") + 1, offset("outputs") + 1]


@on_every_device
def test_a_row_does_not_depend_on_its_batch_mates(device: str) -> None:
    """Alone, a row is split into more chunks; in another order, its slot is another row."""
    rows, vocab = (8, 4100) if device == "cpu" else (200, 151_936)
    generator = torch.Generator().manual_seed(21)
    batch = Batch.of(rows, vocab, device)
    randomize(batch.state, rows, vocab, generator)
    batch.state.live[:rows] = LIVE
    logits = random_logits(rows, vocab, generator).to(device)
    order = torch.randperm(rows, generator=generator).to(device)
    turned, alone = batch.twin(vocab), batch.twin(vocab)
    together = batch.step(logits)
    turned.slots = order.int()
    assert turned.step(logits[order]) == [together[row] for row in order.tolist()]
    for row in range(0, rows, max(1, rows // 10)):
        alone.slots = torch.tensor([row], dtype=torch.int32, device=device)
        assert alone.step(logits[row : row + 1]) == [together[row]]


@on_every_device
def test_a_row_of_which_all_is_forbidden_takes_the_first(device: str) -> None:
    batch = Batch.of(1, 3, device)
    batch.state.stop_ids[0, :3] = torch.arange(3, dtype=torch.int32, device=device)
    batch.state.stop_count[0] = 3
    batch.state.min_tokens[0] = 5
    assert batch.step(torch.zeros(1, 3, device=device)) == [(0, MADE)]


@pytest.mark.gpu
def test_replays_of_a_graph_are_steps() -> None:
    """Captured once, replayed five times: the same tokens as five steps launched one by one."""
    rows, vocab = 64, 32_000
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(rows, vocab, generator=generator) * 2).cuda()
    batch = Batch.of(rows, vocab, "cuda")
    batch.state.temperature[:rows] = 1.0
    batch.state.top_p[: rows // 2] = 0.9
    twin = batch.twin(vocab)
    expected = [twin.step(logits) for _ in range(6)]
    assert batch.step(logits) == expected[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_step(logits, batch.slots, batch.state, batch.out, filtered=True)
    for tokens in expected[1:]:
        graph.replay()
        made = zip(batch.out.tokens.tolist(), batch.out.status.tolist(), strict=True)
        assert list(made) == tokens
