"""Pretraining of timm encoders: MoCo v3, Barlow Twins, MAE and, as their baseline, supervised; one file a method."""
