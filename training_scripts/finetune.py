"""Fine-tune one model of the study on one dataset (paper section 3.2).

accelerate launch training_scripts/finetune.py --model resnet50_deeplabv3plus.supervised_imagenet1k \
    --dataset kvasir_seg --recipe finetune --encoder-weights timm:resnet50.tv_in1k --output runs/rn-in-sl

On CPU with several processes: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 ...
(`--cpu --num_processes 2` silently starts one). Expect what `--num-processes` says you expect.
"""

from polypseg.cli.console import reported, run_script

with reported():  # of a Ctrl-C too, while this is imported
    from polypseg.cli.train import finetune

if __name__ == "__main__":
    run_script(finetune)
