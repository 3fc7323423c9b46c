#!/usr/bin/env bash
# The whole chain on a file of rows, from untrained models:
#     bash recipes/small/run.sh TRAIN.jsonl TEST.jsonl FOLDER [SEED]
# Fine-tunes the teacher, lets it write rationales, distils the student, evaluates it. 120 steps of 8 rows:
# enough to see every number move, in minutes on two cores; not enough to learn the task.
set -euo pipefail
train=$1 test=$2 folder=$3 seed=${4:-10}
training=(--seed "$seed" --max_length 256 --max_prompt_length 160 --max_steps 120 --batch_size 8
    --learning_rate 3e-3 --warmup 0.1 --logging_steps 20)
generation=(--max_length 256 --max_new_tokens 64 --batch_size 64)

python "$(dirname "$0")/make_pair.py" "$train" "$folder/untrained"
python -m cot2align.train sft "${training[@]}" \
    --model "$folder/untrained/teacher" --train "$train" --output "$folder/teacher"
python -m cot2align.train augment "${generation[@]}" --seed "$seed" \
    --model "$folder/teacher" --data "$train" --output "$folder/rationales.jsonl"
python -m cot2align.train distill "${training[@]}" \
    --student "$folder/untrained/student" --teacher "$folder/teacher" \
    --train "$folder/rationales.jsonl" --output "$folder/student"
python -m cot2align.train evaluate "${generation[@]}" --prompts standard cot \
    --model "$folder/student" --data "$test" --output "$folder/scores"
