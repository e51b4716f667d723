"""Pretrain an encoder: MoCo v3, Barlow Twins, MAE or, as their baseline, with labels, as the recipe says.

accelerate launch training_scripts/pretrain.py --recipe pretrain_moco_v3_resnet50 \
    --frames data/hyper-kvasir-unlabeled-images.zip --labelled data/labeled-images --output runs/moco

On CPU with several processes: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
The encoder is then in <output>/encoder, for `finetune.py --encoder-weights <output>/encoder/model.safetensors`.
"""

from polypseg.cli.console import reported, run_script

with reported():  # of a Ctrl-C too, while this is imported
    from polypseg.cli.train import pretrain

if __name__ == "__main__":
    run_script(pretrain)
