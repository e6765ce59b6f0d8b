"""Chats: what a template makes of prompts and references, and the settings of tasks that ask for it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import hydra
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from agents.common.rollout import decode_alone
from envs.decoding.references import References
from envs.environments.prompts import PromptSource
from envs.environments.token_routing import RoutingEnv
from envs.models.loading import load_pool
from envs.tasks.math import MathTask
from envs.tasks.multiple_choice import MultipleChoiceTask
from envs.tasks.task import Chat, Example
from experiments.common.config import build, register_schemas
from experiments.traces.schema import example_hash

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<s>", "</s>", "<|turn|>", "<|user|>", "<|system|>", "<|model|>"]
TURNS = (
    "{% for m in messages %}{{ '<|' + {'assistant': 'model'}.get(m.role, m.role) + '|>' }}"
    "{{ m.content | trim }}<|turn|>\n{% endfor %}"
)
ASK = "{% if add_generation_prompt %}<|model|>{% endif %}"
# An empty thought stands in an answered chat, and in a prompt where thinking is off.
THOUGHT = "{%- if add_generation_prompt and thinking is defined and not thinking %}[]{% endif %}"
THINKING = TURNS.replace("|>' }}", "|>' }}{% if m.role == 'assistant' %}[]{% endif %}") + ASK + THOUGHT
EXAMPLE = Example("chat/0", "What is 1 + 1?", " It is 2. ", "2", Chat())
ROOT = Path(__file__).resolve().parents[1]


def tokenizer(template, adds_bos=False, end="<|turn|>"):
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    letters.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        bos_token="<s>",
        eos_token=end,
        pad_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    if adds_bos:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def chat_pool(tmp_path_factory, save_model):
    """Makes a pool of two random models whose tokenizer has a template; `ends` is what their configuration says."""

    def make(template, ends=("<|turn|>",), name="chat", **settings):
        own = tokenizer(template, **settings)
        ids = own.convert_tokens_to_ids(list(ends))
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 256}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
        folder = str(save_model(name, config, tokenizer=own, ends=ids))
        return load_pool([folder, folder], dtype="float32", rows=4, verbose=False)

    return make


@pytest.fixture(scope="module")
def plain(chat_pool):
    return chat_pool(TURNS + ASK)


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("writes_bos", [False, True])
def test_a_prompt_holds_the_special_tokens_of_the_template_and_no_others(chat_pool, adds_bos, writes_bos):
    pool = chat_pool(("{{ bos_token }}" if writes_bos else "") + TURNS + ASK, adds_bos=adds_bos)
    assert (pool.encode("a")[0] == 0) == adds_bos  # the tokenizer does what it says to texts that are no chats
    ids = pool.encode_prompt(EXAMPLE)
    assert (ids == 0).sum() == writes_bos
    turns = [{"role": "user", "content": EXAMPLE.prompt}]
    assert ids.tolist() == pool.tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_system_and_options_reach_the_template(chat_pool, plain):
    def written(pool, **chat):
        return pool.tokenizer.decode(pool.encode_prompt(replace(EXAMPLE, chat=Chat(**chat))).tolist())

    assert written(plain) == "<|user|>What is 1 + 1?<|turn|>\n<|model|>"
    assert (
        written(plain, system="Be brief.") == "<|system|>Be brief.<|turn|>\n<|user|>What is 1 + 1?<|turn|>\n<|model|>"
    )
    assert written(chat_pool(THINKING), options=(("thinking", False),)).endswith("<|model|>[]")
    assert plain.prompt_text(EXAMPLE) == plain.decode(plain.encode_prompt(EXAMPLE))


def test_a_prompt_that_is_no_chat_is_read_as_it_is(chat_pool):
    pool = chat_pool("{{ bos_token }}" + TURNS + ASK, adds_bos=True)
    example = replace(EXAMPLE, chat=None)
    assert pool.encode_prompt(example).tolist() == pool.encode(example.prompt).tolist()
    assert pool.encode_reference(example).tolist() == pool.encode_response(example.reference).tolist()
    assert pool.prompt_text(example) == example.prompt


def test_a_tokenizer_without_a_template_is_refused_by_the_name_of_the_setting(chat_pool):
    with pytest.raises(ValueError, match=r"task\.chat=true, and the tokenizer of .*chat has no chat template"):
        chat_pool(None).encode_prompt(EXAMPLE)


def test_what_a_template_refuses_is_said_with_its_reason(chat_pool):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + TURNS + ASK
    pool = chat_pool(no_system)
    assert len(pool.encode_prompt(EXAMPLE))
    with pytest.raises(ValueError, match=r"refuses what task\.system asks for \(no system turns\)"):
        pool.encode_prompt(replace(EXAMPLE, chat=Chat(system="Be brief.")))


# -- references -------------------------------------------------------------------------------------------------------


def test_a_reference_is_the_assistants_turn_and_its_end(chat_pool, plain):
    def text(pool, example=EXAMPLE):
        return pool.tokenizer.decode(pool.encode_reference(example).tolist())

    assert text(plain) == "It is 2.<|turn|>"
    # the tokenizer ends texts with another token than the template ends turns with
    assert text(chat_pool(TURNS + ASK, ends=("</s>", "<|turn|>"), end="</s>")) == "It is 2.<|turn|>"
    # a model that thinks would have to write the empty thought, one that is kept from it has read it
    assert text(chat_pool(THINKING)) == "[]It is 2.<|turn|>"
    assert text(chat_pool(THINKING), replace(EXAMPLE, chat=Chat(options=(("thinking", False),)))) == "It is 2.<|turn|>"


def test_a_turn_that_ends_with_no_end_token_is_refused(chat_pool):
    pool = chat_pool(TURNS + ASK, ends=("</s>",))
    with pytest.raises(ValueError, match=r"ends the assistant's turn with '<\|turn\|>\\n', in which .*\('</s>'\)"):
        pool.encode_reference(EXAMPLE)


def test_a_template_that_drops_the_reference_is_refused(chat_pool):
    with pytest.raises(ValueError, match="does not continue the prompt of example chat/0"):
        chat_pool("{{ messages[0].content }}<|turn|>").encode_reference(EXAMPLE)


def test_an_end_inside_a_reference_is_refused_by_its_example(plain):
    bad = replace(EXAMPLE, reference="It<|turn|> is 2.")
    assert plain.encode_reference(bad)[-1] == plain.encode_reference(bad)[2] == plain.end_token
    with pytest.raises(ValueError, match="chat/0: its reference holds an end-of-sequence token"):
        References.read(plain, [bad])


def test_both_models_read_what_the_template_writes(plain):
    read = References.read(plain, [EXAMPLE])
    assert read.prompt_lengths.tolist() == [len(plain.encode_prompt(EXAMPLE))]
    assert read.target.tolist() == plain.encode_reference(EXAMPLE).tolist()


# -- tasks ------------------------------------------------------------------------------------------------------------

CHOICE = {"question": "Where is a book?", "choices": ["a river", "a library"], "answer": 1}
ROUTER = CHOICE | {"prompt": "Question: Where is a book?", "cot": "It is read. Therefore, the answer is a library (b)."}
MATH = {"prompt": None, "cot": "It is 2.\n\\boxed{2}", "answerKey": "2"}


def records(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_an_instruction_takes_the_place_of_what_prompts_ask_for(tmp_path):
    path = records(tmp_path / "choice.jsonl", [ROUTER])
    asked = MultipleChoiceTask(path=path, instruction="Say why.", chat=True, system="Be brief.")
    expected = "Question: Where is a book?\nChoices:\nA. a river\nB. a library\n\nSay why."
    [example] = [asked.example(split, 0) for split in ("train", "validation", "test") if asked.size(split)]
    assert (example.prompt, example.chat) == (expected, Chat("Be brief."))
    own = MultipleChoiceTask(path=path, instruction="Why?", template="{instruction} {question} {choices}")
    [example] = [own.example(split, 0) for split in ("train", "validation", "test") if own.size(split)]
    assert (example.prompt, example.chat) == ("Why? Where is a book? A. a river\nB. a library", None)


def test_the_question_of_published_math_rows_is_found_in_their_prompts(tmp_path):
    published = MathTask(path=records(tmp_path / "q.jsonl", [{"question": "What is 1 + 1?", "answer": "2\n#### 2"}]))
    prompt = next(
        published.example(split, 0).prompt for split in ("train", "validation", "test") if published.size(split)
    )
    path = records(tmp_path / "math.jsonl", [MATH | {"prompt": prompt}])
    task = MathTask(path=path, instruction="Solve it.")
    [example] = [task.example(split, 0) for split in ("train", "validation", "test") if task.size(split)]
    assert example.prompt == "What is 1 + 1?\n\nSolve it."
    other = records(tmp_path / "other.jsonl", [MATH | {"prompt": "1 + 1 = "}])
    with pytest.raises(ValueError, match=r"other\.jsonl:1: no question among the fields"):
        MathTask(path=other, instruction="Solve it.")


def test_an_instruction_leaves_every_problem_in_its_split(tmp_path):
    path = records(tmp_path / "many.jsonl", [CHOICE | {"question": f"Where is {n}?"} for n in range(60)])
    plain, asked = MultipleChoiceTask(path=path), MultipleChoiceTask(path=path, instruction="Say why.", chat=True)

    def questions(task, split):
        return [task.example(split, n).prompt.splitlines()[0] for n in range(task.size(split))]

    for split in ("train", "validation", "test"):
        assert plain.size(split) > 0
        assert questions(plain, split) == questions(asked, split)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"system": "Be brief."}, "system and chat_options go with chat=true"),
        ({"chat_options": {"thinking": False}}, "system and chat_options go with chat=true"),
        ({"chat": True, "chat_options": {"tokenize": True}}, "chat_options has tokenize=True"),
        ({"chat": True, "chat_options": {"tools": [1]}}, r"chat_options has tools=\[1\]"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": "Why?", "template": "{question} {choices}"}, r"lacks \{instruction\}"),
        ({"template": "{question} {choices} {instruction}"}, "asks for an instruction; give one"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        MultipleChoiceTask(path=records(tmp_path / "choice.jsonl", [CHOICE]), **settings)


def test_the_tasks_of_chats_compose(tmp_path):
    register_schemas()
    path = records(tmp_path / "choice.jsonl", [ROUTER])
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("evaluate", ["task=commonsense_qa_chat", f"task.path={path}", "task.system=Be brief."])
        task = build(config, "task")
        compared = hydra.compose("evaluate", ["task=commonsense_qa_jsonl", "task.chat=true", f"task.path={path}"])
        assert build(compared, "task").chat
        assert hydra.compose("evaluate", ["task=gsm8k_chat", f"task.path={path}"]).task.chat
    assert (task.chat, task.system, task.name) == (True, "Be brief.", "commonsense_qa")
    assert task.instruction.endswith("Therefore, the answer is (label).")


# -- what is done with them ------------------------------------------------------------------------------------------


def test_episodes_begin_with_the_prompt_of_the_chat(tmp_path, plain):
    path = records(tmp_path / "many.jsonl", [CHOICE | {"question": f"Where is {n}?"} for n in range(30)])
    task = MultipleChoiceTask(path=path, instruction="Why?", chat=True, system="Be brief.")
    env = RoutingEnv(pool=plain, task=task, max_new_tokens=4)
    _, info = env.reset(seed=0)
    example = env.episodes.examples[0]
    assert info["prompt_tokens"] == len(plain.encode_prompt(example))
    assert Example.from_dict(json.loads(json.dumps(asdict(example)))) == example
    [episode] = decode_alone(plain.slm, task, [example], max_new_tokens=4)
    ids = plain.encode_prompt(example).tolist()
    logits = plain.slm.network(input_ids=plain.slm.network.dummy_inputs["input_ids"].new_tensor([ids])).logits[0, -1]
    assert int(logits.argmax()) == episode.tokens[0]


def test_a_chat_is_another_problem_than_its_text():
    others = [EXAMPLE, replace(EXAMPLE, chat=None), replace(EXAMPLE, chat=Chat("Be brief."))]
    assert len({example_hash(example) for example in others}) == 3


def why(folder):
    return MultipleChoiceTask(
        path=records(folder / "c.jsonl", [CHOICE]),
        test_path=records(folder / "t.jsonl", [CHOICE | {"question": "Where is a pen?"}]),
        instruction="Why?",
        chat=True,
    )


def test_room_is_measured_on_the_whole_chat(tmp_path, plain):
    task = why(tmp_path)
    needed = len(plain.encode_prompt(task.example("test", 0)))
    assert PromptSource(task, "test", plain.encode_prompt, needed)
    with pytest.raises(ValueError, match="1 of 1 test examples have prompts longer"):
        PromptSource(task, "test", plain.encode_prompt, needed - 1)


def test_what_is_cut_of_a_chat_is_the_beginning_of_the_users_text(tmp_path, plain):
    task = why(tmp_path)
    whole = plain.encode_prompt(task.example("test", 0))
    generator = np.random.default_rng(0)
    source = PromptSource(task, "test", plain.encode_prompt, len(whole) - 30, "truncate")
    example, prompt = source.choose(0, generator)
    assert len(prompt) == len(whole) - 30
    assert example.prompt == task.example("test", 0).prompt[30:]
    assert plain.tokenizer.decode(prompt.tolist()).startswith("<|user|>")
    same, prompt = PromptSource(task, "test", plain.encode_prompt, len(whole), "truncate").choose(0, generator)
    assert same == task.example("test", 0)
    with pytest.raises(ValueError, match="its chat alone takes more than the 3 tokens"):
        PromptSource(task, "test", plain.encode_prompt, 3, "truncate").choose(0, generator)
