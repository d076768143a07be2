"""What attention brings from which token: contributions, shares, saliency and LLaVA-CAM."""
