"""Runs of `tiny_run` on the other device, each in its folder with its options; the last line is JSON: what a run failed of, or how often the host read."""

import json
import sys
import traceback

import other_device
from models import CORPUS
from tiny_run import main

from hf_thinktok import ThinkingBudget, ThinkingStreamer, engine, replay, think_while_reading
from hf_thinktok.answers import answer
from hf_thinktok.evaluation import evaluate_thinking
from hf_thinktok.evaluation.inspection import inspect_text
from hf_thinktok.forks import marker_ids

ELSEWHERE = {"use_cpu": False, "dataloader_pin_memory": False}  # pinned memory is a device's own


def use(trainer) -> None:
    """What is done with a model once it is trained."""
    model, vocabulary, tokenizer = trainer.model, trainer.vocabulary, trainer.processing_class
    evaluate_thinking(model, tokenizer, CORPUS[:4], max_length=24, num_forks=4, num_samples=2, batch_size=2)
    inspect_text(model, tokenizer, CORPUS[0], 12)
    prompt = tokenizer(CORPUS[0][:11], return_tensors="pt").to(other_device.DEVICE)
    read = think_while_reading(model, prompt["input_ids"], vocabulary, marker_ids(["cat"], tokenizer), 2)
    budget, streamer = ThinkingBudget(vocabulary, 0, 2, 5, 1.0), ThinkingStreamer(tokenizer)
    model.generate(read, do_sample=True, max_new_tokens=8, logits_processor=[budget], streamer=streamer)


def harness(trainer) -> None:
    """Tasks of the harness, thought at."""
    from lm_eval.api.instance import Instance

    from hf_thinktok.evaluation.harness import ThinkTokLM

    for thoughts in ("none", "own", "always"):
        lm = ThinkTokLM(trainer.model, thoughts=thoughts, tokenizer=trainer.processing_class, batch_size=2)
        lm.loglikelihood([Instance("loglikelihood", {}, ("the cat", " sat on"), i) for i in range(3)])
        lm.generate_until([Instance("generate_until", {}, ("the cat", {"until": ["."], "max_gen_toks": 6}), 0)])


def run(folder: str, options: dict) -> dict[str, int]:
    """Trains, resumes and evaluates; gives how often the host read while it trained, by the project's files."""
    options = dict(options)
    then = options.pop("then", [])
    other_device.reads.clear()
    other_device.graphs.clear()
    trainer = main(folder, ELSEWHERE | options)
    reads = dict(other_device.reads) | {"graphs": len(other_device.graphs)}
    assert trainer.model.device.type == other_device.NAME
    trainer.evaluate(trainer.train_dataset.select(range(4)))
    if "resume" in then:
        main(folder, ELSEWHERE | options | {"resume": f"{folder}/checkpoint-{options['save_steps']}"})
    if "answer" in then:
        for how in ("think", "random", "none"):
            answer(trainer, trainer.train_dataset, how)
    if "use" in then:
        use(trainer)
    if "harness" in then:
        harness(trainer)
    return reads


if __name__ == "__main__":
    engine.REPLAYED.add(other_device.NAME)
    replay.capture = other_device.capture
    told = {}
    for run_folder, run_options in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        try:
            with other_device.present():
                told[run_folder] = run(run_folder, json.loads(run_options))
        except Exception:
            told[run_folder] = traceback.format_exc()
    print(json.dumps(told))
