"""U-ViT (Bao et al. 2023, arXiv 2209.12152) as a diffusers model; diffusers itself has none.

Time, label and image patches are tokens of one plain transformer: no modulation, no gates. Each block of the second
half is told, through `skip_linear`, what its counterpart of the first half gave. Parameters are called as in the
authors' code (github.com/baofff/U-ViT, libs/uvit.py), so their weights fit by name; the configuration is called as in
diffusers' other transformers.
"""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, cat, nn, zeros
from torch.nn import functional

from hcompress.models.parts import unpatchify


class Attention(nn.Module):
    """Self-attention, [R, L, D] to [R, L, D], with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """Attend among all tokens of a row."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=2))
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """[R, L, D] to [R, L, D] through `hidden` and GELU (the exact one)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        """Each token by itself."""
        return self.fc2(functional.gelu(self.fc1(h)))


class Block(nn.Module):
    """h + attention, then h + MLP, each behind a LayerNorm; with `skip`, mix in an earlier block's output first."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, bias: bool, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, bias=bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def mix(self, h: Tensor, skip: Tensor) -> Tensor:
        """The long skip connection: [R, L, D] of both to [R, L, D]."""
        assert self.skip_linear is not None
        return self.skip_linear(cat([h, skip], dim=-1))

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        """[R, L, D]; the blocks of the second half take `skip`."""
        if skip is not None:
            h = self.mix(h, skip)
        h = h + self.attn(self.norm1(h))
        return h + self.mlp(self.norm2(h))


class PatchEmbed(nn.Module):
    """[R, C, H, W] to one token a patch, row by row."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """[R, L, D]."""
        return self.proj(x).flatten(2).transpose(1, 2)


class UViT2DModel(ModelMixin, ConfigMixin):
    """The network: noise in [R, C, H, W] of a square image, its label and its time, to a guess of the same shape.

    num_layers:  blocks in all, odd: as many before the middle one as after
    num_classes: classes that it is told of; 0 makes it unconditional and leaves the label token out
    null_class:  one more label, `num_classes`, stands for no class (trained with label dropout)
    time_mlp:    send the sinusoid of the time through an MLP (the authors' `mlp_time_embed`)
    final_conv:  a 3 x 3 convolution over the finished image (the authors' `conv`)
    time_scale, time_shift: the network was trained to be told time_scale * timestep + time_shift. The authors count
        discrete times from 1 (scale 1, shift 1) and multiply continuous ones, (timestep + 1) / 1000, by 999.
    """

    @register_to_config
    def __init__(
        self,
        num_layers: int = 29,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        sample_size: int = 32,
        patch_size: int = 2,
        num_classes: int = 1000,
        null_class: bool = True,
        mlp_ratio: float = 4.0,
        attention_bias: bool = False,
        time_mlp: bool = False,
        final_conv: bool = True,
        time_scale: float = 1.0,
        time_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers % 2 == 0:
            raise ValueError(f"a U-ViT has an odd number of blocks, not {num_layers}")
        width, half = num_attention_heads * attention_head_dim, num_layers // 2
        self.inner_dim = width
        self.extras = 2 if num_classes else 1  # tokens before those of the image: label, time
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if time_mlp
            else nn.Identity()
        )
        if num_classes:
            self.label_emb = nn.Embedding(num_classes + null_class, width)
        self.pos_embed = nn.Parameter(zeros(1, self.extras + (sample_size // patch_size) ** 2, width))

        def blocks(count: int, *, skip: bool) -> list[Block]:
            return [Block(width, num_attention_heads, mlp_ratio, bias=attention_bias, skip=skip) for _ in range(count)]

        self.in_blocks = nn.ModuleList(blocks(half, skip=False))
        (self.mid_block,) = blocks(1, skip=False)
        self.out_blocks = nn.ModuleList(blocks(half, skip=True))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1) if final_conv else nn.Identity()

    def time_token(self, timesteps: Tensor) -> Tensor:
        """[len(timesteps), 1, D]."""
        times = timesteps.float() * self.config.time_scale + self.config.time_shift
        sinusoid = get_timestep_embedding(times, self.inner_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.time_embed(sinusoid.to(self.pos_embed.dtype))[:, None]

    def embed(self, x: Tensor, labels: Tensor | None, time: Tensor) -> Tensor:
        """All tokens [R, extras + L, D] for x [R, C, H, W], labels int64[R] and time [1 or R, 1, D]."""
        tokens = [time.expand(x.shape[0], -1, -1), self.patch_embed(x)]
        if self.config.num_classes:
            tokens.insert(0, self.label_emb(labels)[:, None])
        return cat(tokens, dim=1) + self.pos_embed

    def decode(self, h: Tensor) -> Tensor:
        """[R, C, H, W] for all tokens [R, extras + L, D]."""
        h = self.decoder_pred(self.norm(h[:, self.extras :]))
        return self.final_layer(unpatchify(h, self.config.patch_size, self.config.in_channels))

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """[R, C, H, W] for x [R, C, H, W], timestep [R] and class_labels int64[R], in diffusers' wrapping."""
        h = self.embed(x, class_labels, self.time_token(timestep))
        skips = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        sample = self.decode(h)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
