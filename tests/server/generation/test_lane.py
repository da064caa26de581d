"""The lane for generation: same answers in any company, fair admission, nothing left behind."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapters.errors import CorruptFile
from adapters.layers.inject import inject
from adapters.modulation.slot_factors import SlotFactors
from server.base.plan import BaseModelError
from server.generation.forward import MIN_PREFILL_TOKENS
from server.generation.lane import GenerateLane
from server.messages import Failure, GenerateResult
from tests.stand.dense import Stage, hira_factors, ids_of, options, prompts, terminals
from tests.stand.generate_lane import VERSIONS, nothing_is_held


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "qwen2"])
def test_greedy_answers_are_those_of_generate_in_any_batch(name: str) -> None:
    stage = Stage(name)
    asked = {}
    for i, prompt in enumerate(prompts(10, 60, seed=1)):
        asked[stage.submit(VERSIONS[i % 4], prompt, stream=i % 2 == 0)] = (VERSIONS[i % 4], prompt)
    results = terminals(stage.drain())
    assert {r.id for r in results} == set(asked)
    assert len({tuple(ids_of(r)) for r in results}) > 5
    for result in results:
        version, prompt = asked[result.id]
        assert ids_of(result) == stage.reference(version, prompt, 12)
        assert ids_of(stage.answer(version, prompt)) == ids_of(result)
        assert (result.version, result.prompt_tokens) == (version, len(prompt))
    assert max(len(plan.slots) for plan in stage.adapted.plans) == 4
    assert nothing_is_held(stage)


def test_adapters_answer_one_prompt_differently() -> None:
    stage = Stage()
    prompt = prompts(1, 20)[0]
    answers = [ids_of(stage.answer(version, prompt)) for version in VERSIONS]
    assert len({tuple(answer) for answer in answers}) == 4


def test_rows_of_one_slot_are_neighbours() -> None:
    stage = Stage()
    for i in range(8):
        stage.submit(VERSIONS[i % 4], prompts(1, 30, seed=i)[0])
    stage.drain()
    for plan in stage.adapted.plans:
        assert len(plan.parts) == len(plan.slots)


@pytest.mark.parametrize("budget", [16, 17, 64])
def test_prompts_are_read_in_chunks_within_the_budget(budget: int) -> None:
    stage = Stage(prefill_tokens=budget)
    asked = {}
    for i, prompt in enumerate(prompts(6, 100, seed=5)):
        asked[stage.submit(VERSIONS[i % 4], prompt, max_new_tokens=6)] = (VERSIONS[i % 4], prompt)
    results = terminals(stage.drain())
    for result in results:
        assert ids_of(result) == stage.reference(*asked[result.id], 6)
    assert max(plan.rows for plan in stage.adapted.plans) <= budget + MIN_PREFILL_TOKENS


def test_a_long_prompt_leaves_the_budget_to_other_adapters() -> None:
    stage = Stage(prefill_tokens=32)
    stage.submit("a", prompts(1, 1, seed=1)[0] * 110, max_new_tokens=1)
    stage.submit("a", prompts(1, 1, seed=2)[0] * 110, max_new_tokens=1)
    short = stage.submit("b", prompts(1, 1, seed=3)[0] * 12, max_new_tokens=1)
    assert [e.id for e in stage.lane.step()] == [short]


def test_the_budget_is_shared_between_adapters() -> None:
    stage = Stage(prefill_tokens=32)
    for version in ("a", "a", "b"):
        stage.submit(version, [5] * 110, max_new_tokens=1)
    stage.lane.step()
    assert [(p.slot, p.rows) for p in stage.adapted.plans[0].parts] == [(1, 16), (2, 16)]


def test_however_many_decode_prompts_are_read() -> None:
    stage = Stage(prefill_tokens=4)
    for i in range(8):
        stage.submit("a", [5 + i], max_new_tokens=100, ignore_eos=True)
    for _ in range(3):
        stage.lane.step()
    late = stage.submit("b", [6] * 20, max_new_tokens=1)
    assert late in [e.id for _ in range(2) for e in stage.lane.step()]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_runs_over_the_adapted_layers(name: str) -> None:
    stage = Stage(name)
    model = copy.deepcopy(stage.adapted.original)
    adapted = inject(model, name="test")
    for version, slot in stage.residency.slots.items():
        pairs = hira_factors(stage.adapted.original, slot)
        adapted.install(slot, {path: SlotFactors("hira", a, b) for path, (a, b) in pairs.items()})
        stage.residency.prefetch(version)
    residency: Any = stage.residency
    stage.lane = GenerateLane(adapted, stage.tokenizer, residency, options())
    asked = {}
    for i, prompt in enumerate(prompts(8, 40, seed=2)):
        asked[stage.submit(VERSIONS[i % 4], prompt)] = (VERSIONS[i % 4], prompt)
    for result in terminals(stage.drain()):
        assert ids_of(result) == stage.reference(*asked[result.id], 12)


def test_the_base_attention_is_left_as_it_was() -> None:
    stage = Stage()
    stage.answer("a", [5, 6, 7])
    assert stage.adapted.model.config._attn_implementation == "sdpa"


# Choosing tokens


def test_sampled_and_greedy_requests_share_a_batch() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=6)[0]
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "seed": 11}
    alone = ids_of(stage.answer("a", prompt, **drawn))
    crowd = [stage.submit(v, p) for v, p in zip(VERSIONS * 2, prompts(8, 40), strict=True)]
    same = stage.submit("a", prompt, **drawn)
    other = stage.submit("a", prompt, **(drawn | {"seed": 12}))
    results = {r.id: ids_of(r) for r in terminals(stage.drain())}
    assert results[same] == alone
    assert results[other] != alone
    for wanted, version, p in zip(crowd, VERSIONS * 2, prompts(8, 40), strict=True):
        assert results[wanted] == stage.reference(version, p, 12)


def test_repetition_penalty_is_that_of_generate() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=7)[0]
    got = stage.answer("b", prompt, repetition_penalty=1.7, max_new_tokens=25)
    assert ids_of(got) == stage.reference("b", prompt, 25, repetition_penalty=1.7)
    assert ids_of(got) != ids_of(stage.answer("b", prompt, max_new_tokens=25))


def test_logprobs_are_those_of_the_model() -> None:
    stage = Stage()
    prompt = prompts(1, 20, seed=8)[0]
    result = stage.answer(None, prompt, logprobs=True, repetition_penalty=1.5)
    with torch.no_grad():
        whole = torch.tensor([prompt + ids_of(result)])
        wanted = stage.adapted.original(whole).logits[0].log_softmax(-1)
    for i, token in enumerate(result.tokens):
        assert token.logprob == pytest.approx(
            wanted[len(prompt) + i - 1, token.id].item(), abs=1e-4
        )


# Room


def test_want_of_room_is_waiting_and_not_failure() -> None:
    stage = Stage(kv_bytes=4096 * 12)  # ten blocks
    asked = {}
    for i, prompt in enumerate(prompts(20, 60, seed=9)):
        asked[stage.submit(VERSIONS[i % 4], prompt, max_new_tokens=8)] = (VERSIONS[i % 4], prompt)
    most = 0
    results = []
    while stage.lane.has_work():
        results += terminals(stage.lane.step())
        figures = stage.lane.figures()
        most = max(most, figures.kv_blocks_used)
        assert figures.kv_blocks_used <= figures.kv_blocks_total == 10
    assert most > 5
    assert {r.id for r in results} == set(asked)
    for result in results:
        assert ids_of(result) == stage.reference(*asked[result.id], 8)
    assert nothing_is_held(stage)


def test_small_requests_cannot_starve_a_large_one() -> None:
    stage = Stage(kv_bytes=4096 * 12)
    large = ""
    done = []
    for i in range(400):
        for _ in range(2):
            stage.submit("b", [5] * 20, max_new_tokens=2)
        if i == 3:
            large = stage.submit("a", [6] * 100, max_new_tokens=28)
        done += [e.id for e in stage.lane.step()]
        if large in done:
            break
    assert large in done


@pytest.mark.parametrize(
    ("prompt", "new", "changes", "code"),
    [
        (100, 29, {}, "input_too_long"),  # the context is 128
        (129, 1, {}, "input_too_long"),
        (60, 22, {"kv_bytes": 4096 * 7}, "input_too_long"),  # five blocks hold 80
        (21, 1, {"max_input_tokens": 20}, "input_too_long"),
        (0, 5, {}, "invalid_input"),
        (5, 0, {}, "invalid_input"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    prompt: int, new: int, changes: dict[str, Any], code: str
) -> None:
    stage = Stage(**changes)
    stage.submit("a", [5] * prompt, max_new_tokens=new)
    (failure,) = stage.drain()
    assert isinstance(failure, Failure)
    assert failure.code == code
    assert failure.found
    assert failure.expected
    assert nothing_is_held(stage)


@pytest.mark.parametrize(
    ("prompt", "new", "changes"),
    [
        (100, 28, {}),
        (127, 1, {}),
        (60, 21, {"kv_bytes": 4096 * 7}),
        (20, 1, {"max_input_tokens": 20}),
    ],
)
def test_what_just_fits_runs(prompt: int, new: int, changes: dict[str, Any]) -> None:
    stage = Stage(**changes)
    result = stage.answer("a", [5] * prompt, max_new_tokens=new, ignore_eos=True)
    assert len(ids_of(result)) == new


def test_a_token_that_the_base_lacks_harms_nobody() -> None:
    stage = Stage()
    bad = stage.submit("a", [5, 10_000])
    good = stage.submit("a", [5, 6])
    results = {e.id: e for e in terminals(stage.drain())}
    assert results[bad].code == "invalid_input"
    assert isinstance(results[good], GenerateResult)


def test_an_id_that_is_here_already_is_refused() -> None:
    stage = Stage()
    stage.submit("a", [5], id="same")
    with pytest.raises(ValueError, match="same"):
        stage.submit("a", [5], id="same")


# Fairness


def test_a_flood_on_one_adapter_does_not_hold_up_another() -> None:
    stage = Stage(max_sequences=16)
    for i in range(64):
        stage.submit("a", [5 + i % 7] * 10, max_new_tokens=40, ignore_eos=True)
    for _ in range(5):
        stage.lane.step()
    assert stage.lane.figures().running == 14  # an eighth is spared
    late = stage.submit("b", [9] * 10, max_new_tokens=4, ignore_eos=True)
    steps = next(i for i in range(1, 100) if late in [e.id for e in stage.lane.step()])
    assert steps == 4


def test_adapters_are_admitted_in_turn() -> None:
    stage = Stage(max_sequences=4)
    for _ in range(12):
        stage.submit("a", [5] * 4, max_new_tokens=3, ignore_eos=True)
    for _ in range(3):
        stage.submit("b", [6] * 4, max_new_tokens=3, ignore_eos=True)
    order = [e.id for e in stage.drain()]
    assert max(order.index(f"r{i}") for i in (13, 14, 15)) < 8


# Adapters that are not there yet


def test_an_adapter_that_loads_delays_nobody() -> None:
    stage = Stage(slow=["b"])
    slow = stage.submit("b", [5, 6])
    quick = stage.submit("a", [5, 6])
    assert [e.id for e in stage.drain()] == [quick]
    assert stage.lane.depth() == 1
    assert not stage.lane.has_work()
    stage.residency.states["b"] = "ready"
    assert stage.lane.has_work()
    assert [e.id for e in stage.drain()] == [slow]
    assert nothing_is_held(stage)


def test_an_adapter_that_was_evicted_meanwhile_is_fetched_again() -> None:
    stage = Stage()
    wanted = stage.submit("b", [5, 6])
    stage.residency.states["b"] = "absent"
    assert [e.id for e in stage.drain()] == [wanted]


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only() -> None:
    stage = Stage(slow=["b"])
    bad = [stage.submit("b", [5, 6]) for _ in range(2)]
    good = stage.submit("a", [5, 6])
    stage.residency.errors["b"] = CorruptFile("Damaged.", found="x", expected="y", fix="z")
    stage.residency.states["b"] = "failed"
    results = {e.id: e for e in stage.drain()}
    for each in bad:
        failure = results[each]
        assert (failure.code, failure.found, failure.fix) == ("corrupt_file", "x", "z")
    assert isinstance(results[good], GenerateResult)
    assert nothing_is_held(stage)


def test_leases_last_as_long_as_sequences() -> None:
    stage = Stage()
    stage.submit("a", [5, 6], max_new_tokens=3, ignore_eos=True)
    stage.submit("a", [5, 7], max_new_tokens=5, ignore_eos=True)
    held = []
    while stage.lane.has_work():
        stage.lane.step()
        held.append(stage.residency.leases["a"])
    assert held == [2, 2, 1, 1, 0]


# Cancel, deadlines, errors


def test_cancelled_requests_leave_nothing_behind() -> None:
    stage = Stage(max_sequences=2)
    ids = [stage.submit("a", [5] * 30, max_new_tokens=50, stream=True) for _ in range(4)]
    stage.lane.step()
    assert stage.lane.cancel(ids[0])
    assert not stage.lane.cancel(ids[0])
    assert stage.lane.cancel(ids[3])
    assert not stage.lane.cancel("unknown")
    assert stage.lane.figures().kv_blocks_used == 5
    rest = {e.id for e in stage.drain()}
    assert rest == {ids[1], ids[2]}
    for each in (ids[1], ids[2]):
        stage.lane.cancel(each)
    assert nothing_is_held(stage)


@pytest.mark.parametrize("running", [True, False])
def test_deadlines_end_requests(running: bool) -> None:
    stage = Stage(slow=() if running else ["b"])
    deadline = time.monotonic() + 1.0
    late = stage.submit("b", [5, 6], max_new_tokens=100, deadline=deadline)
    good = stage.submit("a", [5, 6], max_new_tokens=3)
    assert stage.lane.next_deadline() is not None
    results = [e for _ in range(3) for e in stage.lane.step()]
    time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)
    assert stage.lane.has_work()
    results = {e.id: e for e in results + stage.drain()}  # type: ignore[assignment]
    failure: Any = results[late]  # type: ignore[call-overload]
    assert failure.code == "deadline_exceeded"
    assert isinstance(results[good], GenerateResult)  # type: ignore[call-overload]
    assert nothing_is_held(stage)


def test_an_adapter_that_overflows_fails_alone() -> None:
    stage = Stage()
    healthy = stage.answer("a", [5, 6, 7])
    broken = dict(stage.adapted.slots[2])
    path = next(iter(broken))
    broken[path] = torch.full_like(broken[path], float("nan"))
    stage.adapted.slots[2] = broken
    bad = stage.submit("b", [5, 6, 7], stream=True)
    good = stage.submit("a", [5, 6, 7])
    results = {e.id: e for e in terminals(stage.drain())}
    assert results[bad].code == "adapter_failed"
    assert "finite" in results[bad].message
    assert ids_of(results[good]) == ids_of(healthy)
    assert ids_of(stage.answer("a", [5, 6, 7])) == ids_of(healthy)
    assert nothing_is_held(stage)


def test_a_base_that_overflows_is_the_servers_fault() -> None:
    stage = Stage()
    with torch.no_grad():
        stage.adapted.model.lm_head.weight.fill_(float("nan"))
    assert stage.answer(None, [5, 6, 7]).code == "base_failed"


def test_a_cache_that_holds_nothing_is_refused_with_a_remedy() -> None:
    with pytest.raises(BaseModelError, match=r"found: 10 bytes; expected: at least \d+ bytes; fix"):
        Stage(kv_bytes=10)


def test_a_base_that_goes_around_the_attention_interface_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage()
    attention = stage.adapted.model.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **rest: (hidden_states, None))
    failure = stage.answer(None, [5, 6])
    assert "1 of 2 layers" in failure.found


def test_close_ends_everything() -> None:
    stage = Stage(max_sequences=1)
    ids = [stage.submit("a", [5, 6]) for _ in range(3)]
    stage.lane.step()
    assert {(e.id, e.code) for e in stage.lane.close()} == {(i, "draining") for i in ids}  # type: ignore[union-attr]
    assert nothing_is_held(stage)


def test_times_add_up() -> None:
    stage = Stage()
    began = time.monotonic()
    result = stage.answer("a", [5, 6], submitted=began - 1)
    assert 1000 <= result.queue_ms < 2000 + (time.monotonic() - began) * 1000
    assert 0 < result.compute_ms <= (time.monotonic() - began) * 1000


# Shared prefixes


def shared_answers(sharing: bool) -> tuple[Stage, list[list[int]]]:
    stage = Stage(allow_prefix_sharing=sharing, kv_bytes=4096 * 64)
    prompt = [5, 9, 17, 200] * 15
    answers = []
    for tail in ([], [33, 34], [33, 35]):
        for version in VERSIONS:
            answers.append(ids_of(stage.answer(version, prompt + tail)))
    return stage, answers


def test_prefix_sharing_changes_no_answer() -> None:
    plain, expected = shared_answers(False)
    sharing, got = shared_answers(True)
    assert got == expected
    assert len({tuple(answer) for answer in got[:4]}) == 4
    assert plain.lane.figures().shared_tokens == 0
    # Each version finds its own prefix (three full blocks of 60 tokens) twice, nobody else's.
    assert sharing.lane.figures().shared_tokens == 4 * 2 * 48
    assert sharing.lane.figures().kv_blocks_used == 0
    assert sharing.lane.figures().kv_blocks_cached > 0


def test_without_the_version_in_its_root_a_prefix_would_be_shared_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.generation.kv_cache.KVCache._root", lambda self, version: "all")
    _, expected = shared_answers(False)
    _, got = shared_answers(True)
    assert got != expected


def test_one_prefix_in_one_batch_is_shared_and_freed() -> None:
    stage = Stage(allow_prefix_sharing=True)
    prompt = prompts(1, 1)[0] * 50
    for i in range(6):
        stage.submit("a", [*prompt, 10 + i], max_new_tokens=20)
    for result in terminals(stage.drain()):
        assert ids_of(result) == stage.reference("a", [*prompt, 10 + int(result.id[1:]) - 1], 20)
    assert nothing_is_held(stage)


def test_kept_prefixes_give_way_to_requests() -> None:
    stage = Stage(allow_prefix_sharing=True, kv_bytes=4096 * 10)  # eight blocks
    for i in range(12):
        prompt = prompts(1, 1, seed=i)[0] * 60
        assert ids_of(stage.answer("a", prompt, max_new_tokens=8)) == stage.reference(
            "a", prompt, 8
        )
    assert stage.lane.figures().kv_blocks_used == 0
