"""Train an autoencoder: images to a few numbers each, and back, for a diffusion in its latents.

    python -m tools.train_autoencoder --preset quick               # critters of 128 x 128, in minutes, on a CPU
    python -m tools.train_autoencoder --data my_images --image_size 256 --run_name my_autoencoder
    python train.py --data my_images --image_size 256 --autoencoder checkpoints/my_autoencoder/final_model.pt

Nothing is pre-trained: it learns from the same images as the diffusion, in the same loop. Images beside their
reconstructions, and PSNR and SSIM in metrics.csv, go to outputs/autoencoder/, weights to checkpoints/autoencoder/.
"""

from __future__ import annotations

import shlex

from training.autoencoder import AutoencoderTrainingConfig, train_autoencoder
from training.config import configure, memory_advice
from training.distributed import DistEnv
from utils.errors import one_line_errors

PRESETS = {
    "reference": {},
    # Critters at 128 x 128 on a CPU, in time for `train.py --preset latents`.
    "quick": dict(data="critters", augment="flip", epochs=10, batch_size=4, sample_every=5),
}


def main() -> None:
    with one_line_errors():
        dist = DistEnv()
    with dist.main_process_output(), one_line_errors():
        launch = configure(AutoencoderTrainingConfig, PRESETS, "Train an autoencoder on a folder of images.",
                           "python -m tools.train_autoencoder")
        config = launch.config
        launch.print_notice()
        with memory_advice(config.batch_size, config.grad_accum, dist.world_size):
            final = train_autoencoder(config, launch.checkpoint, dist)
        print(f"done: images beside their reconstructions in outputs/{config.run_name}/; to learn the latents: python "
              f"train.py --autoencoder {shlex.quote(str(final))}")
        launch.print_notice()


if __name__ == "__main__":
    main()
