"""Self-supervised pretraining of timm encoders: MoCo v3, Barlow Twins and MAE, one file a method."""
