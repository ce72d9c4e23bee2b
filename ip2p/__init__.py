"""InstructPix2Pix as a plain library: triplets, image pairs, training, editing. Never imports Ray."""

__version__ = "0.1.0"
