from musiclm_kernels.patch_dropout.op import drop_patches, embed_patches

__all__ = ["drop_patches", "embed_patches"]
