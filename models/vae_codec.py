"""Sound <-> latents by the public networks: log-mel, mel VAE, and BigVGAN on the way back."""

import torch
from einops import rearrange
from torch import Tensor, nn

from models.mel import MEL_CONFIGS, LogMel
from models.spec import ClipSpec
from models.vae import MelVAE
from models.vocoder import BigVGAN


class VAECodec(nn.Module):
    """The codec of a named spec; sounds may be of any length that is a whole number of latent tokens."""

    def __init__(self, spec: ClipSpec, vae: MelVAE, vocoder: BigVGAN | None) -> None:
        """`vae` has folded weights; without a vocoder there is no `decode`."""
        super().__init__()
        self.spec = spec
        self.log_mel = LogMel(MEL_CONFIGS[spec.name])
        self.vae = vae
        self.vocoder = vocoder

    @torch.no_grad()
    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S] in [-1, 1] -> mean and standard deviation of the posterior, both [B, N, C] float32.

        Raises ValueError where S is no whole number of latent tokens.
        """
        own = self.spec.samples_per_latent
        if wave.shape[1] % own:
            raise ValueError(f"{wave.shape[1]} samples are no whole number of latent tokens of {own}")
        mean, std = self.vae.encode(self.log_mel(wave))
        return rearrange(mean, "b c n -> b n c"), rearrange(std, "b c n -> b n c")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, N, C], not normalised -> [B, S] float32 in [-1, 1], one sound at a time.

        One at a time, because the vocoder's activations are hundreds of megabytes a sound and so that a sound does
        not depend on its neighbours. Raises ValueError where there is no vocoder.
        """
        if self.vocoder is None:
            raise ValueError("this codec was loaded without a vocoder and cannot make sound")
        dtype = next(self.vocoder.parameters()).dtype
        mels = (self.vae.decode(rearrange(own, "n c -> 1 c n")) for own in latents)
        return torch.cat([self.vocoder(mel.to(dtype)).float() for mel in mels])[:, 0]
