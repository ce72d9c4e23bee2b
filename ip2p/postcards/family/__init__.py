"""How the shipped family is trained: autoencoder, CLIP, text-to-image UNet, triplet LM and attribute reader."""
