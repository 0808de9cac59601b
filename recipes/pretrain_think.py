"""Continued pretraining of a causal LM that thinks in tokens of its own.

A first run, with a real model and real text that need no account and no network:

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/pretrain_think.py --config recipes/smollm2-135m/quickstart.yaml

Your own model and text:

    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/pretrain_think.py \\
        --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name Salesforce/wikitext --dataset_config wikitext-103-v1 \\
        --max_length 1024 --packing --num_forks 32 --output_dir outputs/mine

    ... --data_files corpus.jsonl --text_template "{question}\\n{answer}"
    ... --data_files chats.jsonl --assistant_only_loss true
    ... --dataset_name me/mine --dataset_test_split validation

Writes a checkpoint that plain `AutoModelForCausalLM` loads; `results.json`, held-out bits per token before training, and after it without thinking, with
thinking, and with a random thought; and `report.html`, the same with curves and with the text, token by token.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_thinktok import ThinkTokConfig, ThinkTokTrainer
from hf_thinktok.checkpoints import PushError
from hf_thinktok.errors import RunError, one_sentence
from hf_thinktok.loading import fit_to_cpu, init_kwargs
from hf_thinktok.recipe_options import read_options, recipe_parser
from hf_thinktok.results import changed_options, environment, print_results, training_results, write_json
from hf_thinktok.sources import resolve_model
from hf_thinktok.text import PretrainArguments, check_column, load_parts


def make_trainer(script: PretrainArguments, args: ThinkTokConfig, model: ModelConfig) -> ThinkTokTrainer:
    """The trainer of this text and model; where there is text to compare on, it evaluates before its first step."""
    if not model.model_name_or_path:
        raise ValueError("There is no model: give model_name_or_path.")
    check_column(args.dataset_text_field)
    train, held_out, _ = load_parts(script)
    if held_out is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy={args.eval_strategy.value} has nothing to evaluate on: set held_out_documents to 2 or more, or leave it out.")
    args.model_init_kwargs = init_kwargs(model, args.model_init_kwargs)
    args.eval_on_start |= held_out is not None and args.thinks  # within training, where launchers have set up what they run
    return ThinkTokTrainer(
        resolve_model(model.model_name_or_path),
        args,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )


def main(trainer: ThinkTokTrainer, script: PretrainArguments, config: dict) -> None:
    args, where, has_results = trainer.args, environment(), False
    with one_sentence(RunError):
        training = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if trainer.is_world_process_zero():
        (Path(args.output_dir) / "results.json").unlink(missing_ok=True)  # of an earlier run, whose model is replaced here
    trainer.save_model(args.output_dir, _internal_call=True)  # and no push, which comes with the results
    trainer.save_state()  # the curves, for `thinktok report`
    if trainer.eval_dataset is not None and args.thinks:
        before = next((entry for entry in trainer.state.log_history if "eval_gain" in entry), None)
        evaluations = sum("eval_gain" in entry and entry["step"] > 0 for entry in trainer.state.log_history)  # any of which may have chosen
        after = trainer.evaluate()
        if trainer.is_world_process_zero() and before is None:
            print(f"Nothing was thought in the held-out text (fork_positions={args.fork_positions}), so there is nothing to report.", file=sys.stderr)
        elif trainer.is_world_process_zero():
            steps, best_of = trainer.state.global_step, 1
            if args.load_best_model_at_end and trainer.state.best_global_step is not None:
                steps, best_of = trainer.state.best_global_step, evaluations
            results = training_results(before, after, training, config, steps, best_of) | where | trainer.spent.elsewhere(where)
            write_json(Path(args.output_dir) / "results.json", results)
            print_results(results)
            has_results = True
    elif trainer.eval_dataset is not None and args.eval_strategy == "no" and trainer.is_world_process_zero():
        print("Nothing is thought in this run, so its held-out text was not measured: eval_strategy=steps logs its loss.", file=sys.stderr)
    try:
        if args.push_to_hub:
            with one_sentence(PushError):
                trainer.push_to_hub()
    finally:
        if has_results:  # the other processes, which wait for each other in a push, have no part in it
            report(args.output_dir, script.report_documents, args.max_length or 256, args.trust_remote_code)


def report(folder: str, documents: int, max_length: int, trust_remote_code: bool) -> None:
    """Writes report.html. In a process of its own: in this one launchers may hold whatever is loaded in parts."""
    command = ["report", folder, "--output", str(Path(folder) / "report.html"), "--documents", str(documents), "--max_length", str(max_length)]
    command += ["--trust_remote_code"] * trust_remote_code
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", *["OMP_NUM_THREADS"] * (int(os.environ.get("WORLD_SIZE", 1)) > 1))  # one thread to each process
    own = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    if subprocess.run([sys.executable, "-m", "hf_thinktok.cli", *command], env=own).returncode:
        print(f"There is no report, as is said above; once that is put right, `thinktok report {folder}` makes it.", file=sys.stderr)


if __name__ == "__main__":
    with one_sentence():
        script_args, think_args, model_args = read_options(recipe_parser(__doc__, PretrainArguments, ThinkTokConfig, ModelConfig))
        think_args = fit_to_cpu(think_args)
        options = changed_options(script_args, think_args, model_args)
        the_trainer = make_trainer(script_args, think_args, model_args)
    main(the_trainer, script_args, options)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
