"""musicnn's music tagger (Pons & Serra, 2019; ISC) in PyTorch, weights from the wheel's checkpoint.

The `MTT_musicnn` checkpoint: 50 tags of MagnaTagATune, trained on recordings, none of which this
project uses. The architecture is `build_musicnn` of musicnn 0.1.0's models.py with dropout off and
batch statistics frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musiclm_engine.evaluation.packages import import_library, wheel_folder
from musiclm_engine.evaluation.tensor_bundle import read_tensor_bundle

SAMPLE_RATE_HZ = 16_000
FFT_SAMPLES = 512
HOP_SAMPLES = 256
NUM_MELS = 96
PATCH_FRAMES = 187  # 3 s, what the network was trained on
BATCH_NORM_EPS = 1e-3  # tf.layers' default

# configuration.MTT_LABELS, in the order of the network's outputs.
MTT_TAGS = (
    "guitar", "classical", "slow", "techno", "strings", "drums", "electronic", "rock", "fast",
    "piano", "ambient", "beat", "violin", "vocal", "synth", "female", "indian", "opera", "male",
    "singing", "vocals", "no vocals", "harpsichord", "loud", "quiet", "flute", "woman",
    "male vocal", "no vocal", "pop", "soft", "sitar", "solo", "man", "classic", "choir",
    "voice", "new age", "dance", "male voice", "female vocal", "beats", "harp", "cello",
    "no voice", "weird", "country", "metal", "female voice", "choral",
)  # fmt: skip


@dataclass(frozen=True)
class Tagging:
    """What the network makes of a clip.

    Attributes:
        probabilities: [50] of the tags, means over the clip's 3 s patches.
        embedding: [patches, 200], the layer before the tags.
    """

    probabilities: np.ndarray
    embedding: np.ndarray

    def log_odds(self, tag: str) -> float:
        """log p/(1-p) of one of `MTT_TAGS`. Raises ValueError for another tag."""
        if tag not in MTT_TAGS:
            raise ValueError(f"{tag!r} is not one of musicnn's tags: {', '.join(MTT_TAGS)}")
        return float(self.all_log_odds[MTT_TAGS.index(tag)])

    @property
    def all_log_odds(self) -> np.ndarray:
        """log p/(1-p) [50], in the order of `MTT_TAGS`."""
        # A float32 sigmoid may round to 0 or 1.
        p = np.clip(self.probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
        return np.log(p / (1 - p))


class MusicTagger:
    """Tags clips with musicnn on the CPU.

    Raises ModuleNotFoundError, naming the install command, where musicnn or librosa is missing.
    """

    def __init__(self) -> None:
        self._librosa = import_library("librosa")
        self._network = load_musicnn()

    def __call__(self, audio: np.ndarray, sample_rate_hz: int) -> Tagging:
        """Tags of mono `audio` [samples], float32 in [-1, 1]; a shorter clip is repeated to 3 s.

        Raises ValueError if it is not 1-D, or empty.
        """
        if audio.ndim != 1 or not len(audio):
            raise ValueError(f"audio must be mono, shape (samples,); got {audio.shape}")
        audio = soxr.resample(np.asarray(audio, np.float32), sample_rate_hz, SAMPLE_RATE_HZ)
        mel = self._librosa.feature.melspectrogram(
            y=audio, sr=SAMPLE_RATE_HZ, n_fft=FFT_SAMPLES, hop_length=HOP_SAMPLES, n_mels=NUM_MELS
        ).T  # [frames, mels]
        # musicnn rounds to float16 first, where 10000·mel overflows on loud clips.
        log_mel = np.log10(10_000 * mel + 1)
        if len(log_mel) < PATCH_FRAMES:  # "repeat-pad", as in its training configuration
            log_mel = np.resize(log_mel, (PATCH_FRAMES, NUM_MELS))
        num_patches = len(log_mel) // PATCH_FRAMES
        patches = log_mel[: num_patches * PATCH_FRAMES].reshape(num_patches, PATCH_FRAMES, NUM_MELS)
        with torch.inference_mode():
            logits, penultimate = self._network(torch.from_numpy(patches.astype(np.float32)))
        return Tagging(logits.sigmoid().mean(0).numpy(), penultimate.numpy())


class Musicnn(nn.Module):
    """Log-mel patches [B, frames, 96] to tag logits [B, 50] and the penultimate layer [B, 200]."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm2d(1, BATCH_NORM_EPS)
        self.timbral = nn.ModuleList(
            [_Block(nn.Conv2d(1, 204, (7, num_mels))) for num_mels in (38, 67)]
        )
        self.temporal = nn.ModuleList(
            [_Block(nn.Conv2d(1, 51, (length, 1))) for length in (128, 64, 32)]
        )
        self.middle = nn.ModuleList(
            [_Block(nn.Conv1d(num_inputs, 64, 7)) for num_inputs in (561, 64, 64)]
        )
        self.pool_norm = nn.BatchNorm1d(1506, BATCH_NORM_EPS)
        self.dense = nn.Linear(1506, 200)
        self.dense_norm = nn.BatchNorm1d(200, BATCH_NORM_EPS)
        self.output = nn.Linear(200, 50)

    def forward(self, log_mel: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input_norm(log_mel[:, None])
        front = torch.cat([block(x).amax(-1) for block in [*self.timbral, *self.temporal]], 1)
        first = self.middle[0](front)
        second = self.middle[1](first) + first
        third = self.middle[2](second) + second
        features = torch.cat([front, first, second, third], 1)  # [B, 753, frames]
        pooled = torch.stack([features.amax(-1), features.mean(-1)], -1).flatten(1)
        penultimate = self.dense_norm(self.dense(self.pool_norm(pooled)).relu())
        return self.output(penultimate), penultimate


class _Block(nn.Module):
    """Convolution over all frames, ReLU, then batch norm, in musicnn's order."""

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        norm = nn.BatchNorm2d if isinstance(convolution, nn.Conv2d) else nn.BatchNorm1d
        self.norm = norm(convolution.out_channels, BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow's "same": an even kernel has the larger half of its padding at the end.
        length = self.convolution.kernel_size[0]
        time = ((length - 1) // 2, length // 2)
        pad = time if isinstance(self.convolution, nn.Conv1d) else (0, 0, *time)
        return self.norm(self.convolution(F.pad(x, pad)).relu())


def load_musicnn() -> Musicnn:
    """The network with the weights of the `MTT_musicnn` checkpoint, in eval mode.

    TensorFlow numbers variables in the order of creation: batch norm 0 is the input's, 1 to 8
    follow convolutions 0 to 7, 9 is the pool's and 10 the dense layer's.
    """
    # The checkpoint's name is empty: its files are `.index` and `.data-00000-of-00001`.
    tensors = read_tensor_bundle(f"{wheel_folder('musicnn')}/MTT_musicnn/")
    network = Musicnn()
    blocks = [*network.timbral, *network.temporal, *network.middle]
    norms = [
        network.input_norm,
        *(block.norm for block in blocks),
        network.pool_norm,
        network.dense_norm,
    ]
    state: list[tuple[Tensor, np.ndarray]] = []
    for number, norm in enumerate(norms):
        prefix = _numbered("batch_normalization", number)
        for name, target in (
            ("gamma", norm.weight),
            ("beta", norm.bias),
            ("moving_mean", norm.running_mean),
            ("moving_variance", norm.running_var),
        ):
            state.append((target, tensors[f"{prefix}/{name}"]))
    for number, block in enumerate(blocks):
        kernel = tensors[f"{_numbered('conv2d', number)}/kernel"]  # [time, frequency, in, out]
        if isinstance(block.convolution, nn.Conv1d):
            kernel = kernel[:, :, 0].transpose(2, 1, 0)  # its "frequency" is the channel axis
        else:
            kernel = kernel.transpose(3, 2, 0, 1)
        state.append((block.convolution.weight, kernel))
        state.append((block.convolution.bias, tensors[f"{_numbered('conv2d', number)}/bias"]))
    for number, layer in enumerate((network.dense, network.output)):
        state.append((layer.weight, tensors[f"{_numbered('dense', number)}/kernel"].T))
        state.append((layer.bias, tensors[f"{_numbered('dense', number)}/bias"]))
    with torch.no_grad():
        for target, value in state:
            assert target.shape == value.shape, (target.shape, value.shape)
            target.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return network.eval().requires_grad_(False)


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
