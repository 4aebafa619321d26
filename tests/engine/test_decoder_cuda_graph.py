"""A step as a CUDA graph: what can be seen without a GPU, and on one the same tokens as without."""

from contextlib import contextmanager

import pytest
import torch

from musiclm_engine.audiolm import SemanticTransformer
from musiclm_engine.generation import Decoding, Sampling, derive_seeds
from musiclm_engine.generation.cuda_graph import WARM_UP_CALLS, CudaGraph
from musiclm_engine.generation.decode import decode_stage
from musiclm_engine.generation.stage_steps import StageSteps, cache_bytes


class MakeBelieve:
    """CUDA as `CudaGraph` uses it: what is called during a capture happens at each replay."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream("own"))
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        self.recording = None
        self.launches = None

    def stream(self, name):
        class Stream:
            def wait_stream(_, other):
                self.events.append(f"{name} waits for {other}")

            def __str__(_):
                return name

        return Stream()

    @contextmanager
    def within(self, stream):
        self.events.append(f"on {stream}")
        yield

    @contextmanager
    def capture(self, graph, *, stream, capture_error_mode):
        assert graph is self and stream is not None
        assert capture_error_mode == "thread_local"  # others may use the device meanwhile
        self.events.append("capture")
        self.recording = []
        yield
        self.launches, self.recording = self.recording, None

    def launch(self, work):
        """What a function of this device does: run now, or be recorded."""
        if self.recording is None:
            self.events.append("launch")
            work()
        else:
            self.recording.append(work)

    def replay(self):
        for work in self.launches:
            work()


def test_a_graph_counts_only_its_replays(monkeypatch):
    device = MakeBelieve(monkeypatch)
    state, scratch = torch.tensor([5.0]), torch.tensor([0.0])
    seen = []

    def step():
        device.launch(lambda: seen.append(float(state)))
        device.launch(lambda: state.add_(1))
        device.launch(lambda: scratch.add_(1))

    graph = CudaGraph(step, state=[state])
    assert state == 5 and scratch == WARM_UP_CALLS  # state is as it was; the rest was not asked for
    assert seen == [5.0] * WARM_UP_CALLS  # each warm-up call began where the first did
    assert device.events == [
        "side waits for own", "on side", *["launch"] * 3 * WARM_UP_CALLS, "own waits for side",
        "capture",
    ]  # fmt: skip
    seen.clear()
    graph.replay(), graph.replay()
    assert seen == [5.0, 6.0] and state == 7


@pytest.fixture(scope="module")
def stage(with_opinions):
    torch.manual_seed(0)
    stage = SemanticTransformer(
        num_semantic_tokens=24, conditioning_size=8, conditioning_length=2, dim=64, depth=2,
        heads=2, dim_head=32, max_frames=64,
    )  # fmt: skip
    return with_opinions(stage).eval()


def decode(stage, *, frames=40, seed=0, sampling=None, **options):
    device = stage.start_token.device
    return decode_stage(
        stage,
        conditioning=torch.tensor([[1, 2], [3, 4], [5, 6]], device=device),
        context=None,
        prefix=torch.zeros(3, 0, 1, dtype=torch.int64, device=device),
        frames=frames,
        seeds=derive_seeds(seed, count=3).to(device),
        sampling=sampling or Sampling(top_k=8, guidance=2.0),
        **options,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16, torch.int8])
def test_a_graph_draws_what_the_same_launches_draw_one_by_one(stage, weight_dtype):
    stage = SemanticTransformer.from_config(stage.config).eval().cuda()
    steps = StageSteps()
    for seed in range(3):  # the second and third take the graph that the first captured
        found = decode(
            stage, seed=seed, steps=steps, capacity=50, decoding=Decoding(weight_dtype=weight_dtype)
        )
        wanted = decode(
            stage, seed=seed, capacity=50,
            decoding=Decoding(weight_dtype=weight_dtype, graph=False),
        )  # fmt: skip
        assert torch.equal(found, wanted)


# What is kept of a stage.


def borrowed(steps, stage, **changes):
    arguments = {
        "rows": 2, "length": 9, "sampling": Sampling(), "decoding": Decoding(), **changes,
    }  # fmt: skip
    with steps.borrow(stage, **arguments) as step:
        return step


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Steps are kept as they are there."""
    from musiclm_engine.generation import stage_steps

    monkeypatch.setattr(stage_steps, "is_on_gpu", lambda stage: True)


def test_a_step_that_fits_is_used_again(stage, on_a_gpu):
    steps = StageSteps()
    step = borrowed(steps, stage)
    assert borrowed(steps, stage) is step
    for changes in (
        {"rows": 3},
        {"length": 8},
        {"sampling": Sampling(top_k=3)},
        {"decoding": Decoding(weight_dtype=torch.int8)},
    ):
        other = borrowed(steps, stage, **changes)
        assert other is not step and borrowed(steps, stage, **changes) is other


def test_a_step_in_use_is_nobody_elses(stage, on_a_gpu):
    steps = StageSteps()
    own = {"rows": 2, "length": 9, "sampling": Sampling(), "decoding": Decoding()}
    with steps.borrow(stage, **own) as first, steps.borrow(stage, **own) as second:
        assert first is not second


def test_new_weights_make_a_new_step(stage, on_a_gpu):
    stage = SemanticTransformer.from_config(stage.config)
    steps, options = StageSteps(), {"decoding": Decoding(weight_dtype=torch.int8)}
    step = borrowed(steps, stage, **options)
    with torch.no_grad():
        stage.logit_weights.add_(1.0)
    assert borrowed(steps, stage, **options) is not step
    step = borrowed(steps, stage, **options)
    stage.to(torch.float16)
    assert borrowed(steps, stage, **options) is not step


def test_trained_weights_are_decoded(stage):
    """Also where they are converted first, and in one and the same store."""
    stage = SemanticTransformer.from_config(stage.config).eval()
    steps, options = StageSteps(), {"decoding": Decoding(weight_dtype=torch.int8)}
    before = decode(stage, steps=steps, **options)
    with torch.no_grad():
        for weight in stage.parameters():
            weight.copy_(torch.randn_like(weight))
    after = decode(stage, steps=steps, **options)
    assert torch.equal(after, decode(stage, **options)) and not torch.equal(after, before)


def swapped(stage):
    for weight in stage.parameters():
        weight.data.mul_(1.01)


def loaded(stage):
    with torch.inference_mode():
        stage.load_state_dict({name: 1.01 * value for name, value in stage.state_dict().items()})


@pytest.mark.parametrize("change", [swapped, loaded])
@pytest.mark.parametrize("is_inference", [False, True])
def test_weights_written_uncounted_make_a_new_step(stage, on_a_gpu, change, is_inference):
    """As an average of weights is swapped in, and as a checkpoint is loaded for inference."""
    with torch.inference_mode(is_inference):
        stage = SemanticTransformer.from_config(stage.config)
        steps = StageSteps()
        step = borrowed(steps, stage)
        assert borrowed(steps, stage) is step
        change(stage)
        assert borrowed(steps, stage) is not step


def test_weights_that_are_no_numbers_are_still_the_same(stage, on_a_gpu):
    stage = SemanticTransformer.from_config(stage.config)
    stage.logit_weights.data.fill_(float("nan"))
    steps = StageSteps()
    assert borrowed(steps, stage) is borrowed(steps, stage)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_dtype": torch.bfloat16}, {"cache_dtype": torch.float8_e4m3fn}],
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_bytes_of_a_cache_are_told_before_it_is_made(stage, on_a_gpu, options, guidance):
    steps = StageSteps()
    arguments = {
        "rows": 2, "length": 9, "sampling": Sampling(guidance=guidance),
        "decoding": Decoding(**options),
    }  # fmt: skip
    assert steps.kept_bytes(stage) == 0
    borrowed(steps, stage, **arguments)
    assert steps.kept_bytes(stage) == cache_bytes(stage, **arguments) > 0


def test_copies_keep_nothing(stage):
    import copy

    steps = StageSteps()
    borrowed(steps, stage)
    assert not copy.deepcopy(steps)._decoders and steps._decoders


@pytest.mark.parametrize(
    "options", [{"weight_dtype": torch.int32}, {"cache_dtype": torch.bfloat16}]
)
def test_precisions_that_are_none_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}, wanted None or"):
        Decoding(**options)
