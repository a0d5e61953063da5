"""A sample on its way: what is shown is what the sampler did."""

from dataclasses import replace
from pathlib import Path

from tests.models.test_completion import block_checkpoint
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import SDARSamplerConfig
from tokendiff.models.completion import CompletionModel
from tokendiff.models.tracing import can_be_traced, trace_sample


def test_a_sample_that_is_written_block_by_block(tmp_path: Path) -> None:
    checkpoint = block_checkpoint(tmp_path / "final", block_length=4, attention_mask_mode="4d")
    process = NoiseProcess.load(checkpoint)
    assert can_be_traced(process)
    assert not can_be_traced(replace(process, attention_mask_mode="2d"))
    row = [4, 5, 6, 7, 8, 9, 4, 5, 6, 7]
    trace = trace_sample(checkpoint, row=row, seed=3)
    mask, prompt = trace.mask_token_id, row[:8]
    assert trace.num_prompt_tokens == 8
    assert all(frame[:8] == prompt for frame in trace.frames)
    final = trace.frames[-1]
    assert trace.frames[0] == [*prompt, *[mask] * (len(final) - 8)]
    assert mask not in final
    for before, after in zip(trace.frames, trace.frames[1:], strict=False):
        assert all(new == old for old, new in zip(before, after, strict=True) if old != mask)
    assert trace.times[0] == 1.0
    assert trace.times[-1] == 0.0
    assert sorted(trace.times, reverse=True) == trace.times
    config = GenerateConfig(
        checkpoint_path=str(checkpoint),
        sampler=SDARSamplerConfig(max_new_tokens=64 - 8, temperature=1.0),
        seed=3,
    )
    model = CompletionModel(config, checkpoint=checkpoint)
    passes: list[list[int]] = []
    completion = model.traced(prompt, on_step=lambda tokens: passes.append(tokens[0].tolist()))
    assert list(completion.tokens) == final[8:]
    assert len(passes) == len(trace.frames) - 1
    assert set(trace.vocabulary) == {token for frame in trace.frames for token in frame}


def test_of_a_chat_the_answer_is_written(tmp_path: Path) -> None:
    checkpoint = block_checkpoint(tmp_path / "final", block_length=4, attention_mask_mode="4d")
    row = [4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9]
    trace = trace_sample(checkpoint, row=row, seed=3, num_given=11)
    assert trace.num_prompt_tokens == 11
    assert all(frame[:11] == row[:11] for frame in trace.frames)
