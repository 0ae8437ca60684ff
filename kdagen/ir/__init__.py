"""The intermediate languages: canonical form, tensor IR, tile IR."""
