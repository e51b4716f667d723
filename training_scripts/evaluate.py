"""Score any model on a part of a dataset, at the masks' own size, and leave a receipt: `polypseg evaluate` as a script.

python training_scripts/evaluate.py --model runs/rn-in-sl/best --dataset cvc_clinicdb
"""

from polypseg.cli.console import reported, run_script

with reported():  # of a Ctrl-C too, while this is imported
    from polypseg.cli.evaluate import evaluate

if __name__ == "__main__":
    run_script(evaluate)
