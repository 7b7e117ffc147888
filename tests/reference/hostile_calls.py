"""Hostile calls: sessions, parameters, questions and forms of tensors that are not as agreed."""

import math
from collections.abc import Callable

from framesink.serving import contract
from reference.hostile_requests import Attack, Attacker, array, join, ours, strings

# More than any vocabulary has.
VOCABULARY = 1 << 20
NOT_UTF8 = (b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"ok\x80")


def bad_question(attacker: Attacker) -> Attack:
    content, sentence = attacker.pick(
        (
            ((attacker.pick(NOT_UTF8),), "QUESTION is not valid UTF-8"),
            ((b"",), "QUESTION is empty"),
            ((b" \n\t",), "QUESTION is empty"),
            ((b"a", b"b"), "A request has 2 questions"),
            ((b"x" * 2049,), "QUESTION has 2049 characters"),
            (("\U0001f4a3" * 3000).encode().split(b"|"), "QUESTION has 3000 characters"),
        )
    )
    return attacker.attack("bad question", ours(sentence), strings("QUESTION", *content))


def bad_parameter(attacker: Attacker) -> Attack:
    name, value, sentence = attacker.pick(
        (
            ("shell", "rm -rf /", "There is no parameter"),
            ("a" * 10_000, 1, "There is no parameter"),
            ("", "", "There is no parameter"),
            ("query", "Say more.", "The parameter query belongs"),
            ("policy", "full", "The parameter policy belongs"),
            ("temperature", 0.5, "The parameter temperature belongs"),
            ("finish", True, "The parameter finish belongs"),
            ("dropped", -1, "dropped=-1 must be from"),
            ("dropped", 1 << 40, "dropped="),
            ("dropped", "many", "dropped='many' must be of type"),
            ("dropped", True, "dropped='True' must be of type"),
            ("dropped", 1.5, "dropped='1.5' must be of type"),
        )
    )
    return attacker.attack("bad parameter", ours(sentence), **{name: value})


def bad_opening(attacker: Attacker) -> Attack:
    name, value, sentence = attacker.pick(
        (
            ("query", "x" * 8193, "query has 8193 characters"),
            ("query", 7, "query='7' must be of type"),
            ("previous_text", "y" * 65_537, "previous_text has 65537 characters"),
            ("policy", "none", "There is no policy"),
            ("policy", False, "policy='False' must be of type"),
            ("temperature", math.nan, "temperature='nan' must be of type"),
            ("temperature", math.inf, "temperature='inf' must be of type"),
            ("temperature", -1.0, "temperature=-1 must be from"),
            ("temperature", 1e-300, "temperature=1e-300 must be"),
            ("top_p", 0.0, "top_p=0 must be from"),
            ("top_k", -1, "top_k=-1 must be from"),
            ("repetition_penalty", 0.0, "repetition_penalty=0 must be from"),
            ("seed", -1, "seed=-1 must be from"),
            ("max_new_tokens", 0, "max_new_tokens=0 must be from"),
            ("max_new_tokens", 1 << 62, "max_new_tokens="),
            ("max_patches", 0, "max_patches=0 must be from"),
            ("vision_seconds", 0.0, "vision_seconds=0 must be from"),
            ("vision_seconds", 1e300, "vision_seconds=1e[+]300 must be from"),
            ("sink_text", -5, "sink_text=-5 must be from"),
            ("recent_text", 1 << 62, "recent_text="),
            ("reply_turns", "8", "reply_turns='8' must be of type"),
            ("chunk_seconds", 0.0, "chunk_seconds=0 must be from"),
            ("finish", "yes", "The parameter finish belongs"),
        )
    )
    given = {name: value, "sequence_id": attacker.new_number(), "sequence_start": True}
    return attacker.attack("bad opening", ours(sentence), **given)


def wrong_precision(attacker: Attacker) -> Attack:
    given = {"sequence_id": attacker.new_number(), "sequence_start": True, "precision": "int1,int0"}
    return attacker.attack(
        "wrong precision", ours("The language model here is", "UNSUPPORTED"), **given
    )


def second_start(attacker: Attacker) -> Attack:
    refusal = ours("The session [0-9]+ is open already", "ALREADY_EXISTS")
    return attacker.attack("second start", refusal, sequence_start=True)


def unknown_session(attacker: Attacker) -> Attack:
    end = attacker.pick((False, True))
    number = attacker.new_number()
    refusal = "must specify the START flag"
    return attacker.attack("unknown session", refusal, sequence_id=number, sequence_end=end)


def wrong_number(attacker: Attacker) -> Attack:
    """Triton itself refuses 0 and takes texts; negative numbers are large ones."""
    number, refusal = attacker.pick(
        (
            (0, "must specify a non-zero or non-empty correlation ID"),
            ("", "must specify a non-zero or non-empty correlation ID"),
            ("admin", ours("A session is named by a sequence id that is a whole number above 0")),
            (1.5, "sequence_id"),
            (True, "sequence_id"),
        )
    )
    given = {"sequence_id": number, "sequence_start": True, "sequence_end": True}
    return attacker.attack("wrong number", refusal, **given)


def wrong_form(attacker: Attacker) -> Attack:
    """What Triton itself refuses."""
    content, refusal = attacker.pick(
        (
            (("RAW_FRAMES", "FP32", (9,), bytes(36)), "data-type is 'FP32'"),
            (("RAW_FRAMES", "INT8", (9,), bytes(9)), "data-type is 'INT8'"),
            (("RAW_FRAMES", "UINT8", (3, 3), bytes(9)), "unexpected shape"),
            (("RAW_FRAMES", "UINT8", (-1,), bytes(9)), "should be specified"),
            (("RAW_FRAMES", "UINT8", (-2,), bytes(9)), "byte size mismatch"),
            (("RAW_FRAMES", "UINT8", (1 << 40,), bytes(9)), "byte size mismatch"),
            (("RAW_FRAMES", "UINT8", (9,), bytes(8)), "byte size mismatch"),
            (("TIMESTAMPS", "UINT8", (1 << 50,), b""), "byte size mismatch"),
            (("TIMESTAMPS", "FP64", (2,), bytes(16)), "data-type is 'FP64'"),
            (("CHUNK_SPAN", "BYTES", (1,), join(b"0")), "data-type is 'BYTES'"),
            (("FRAMES", "UINT8", (5,), bytes(5)), "data-type is 'UINT8'"),
            (("FRAMES", "NONE", (1,), bytes(5)), "data-type is"),
            (("FRAMES", "BYTES", (1, 1), join(b"a")), "unexpected shape"),
            (("FRAMES", "BYTES", (1,), b"\xff\xff\xff\x7fabc"), "incomplete string"),
            (("FRAMES", "BYTES", (1,), b"\xff\xff\xff\xffabc"), "incomplete string"),
            (("FRAMES", "BYTES", (1,), b"\x01"), "incomplete string length"),
            (("FRAMES", "BYTES", (5,), join(b"a")), "expected 5 string elements"),
            (("FRAMES", "BYTES", (1 << 40,), join(b"a")), "string elements"),
            (("FRAMES", "BYTES", (1 << 62,), b""), "string elements"),
            (("FRAMES", "BYTES", (-2,), join(b"a", b"b")), "string elements"),
            (("FRAMES", "BYTES", (0,), join(b"a")), "string elements"),
            (("QUESTION", "BYTES", (1,), join(b"a", b"b")), "string elements"),
            (("NOTHING", "BYTES", (1,), join(b"a")), "unexpected inference input 'NOTHING'"),
            (("FRAMES;DROP", "BYTES", (1,), join(b"a")), "unexpected inference input"),
        )
    )
    return attacker.attack("wrong form", refusal, content)


def wrong_model(attacker: Attacker) -> Attack:
    model = attacker.pick(
        ("nothing", "../../etc", "LANGUAGE_MODEL", "language_model/1", "a" * 9000)
    )
    return attacker.attack("wrong model", "(unknown model|not found)", model=model)


def forged_refusal(attacker: Attacker) -> Attack:
    content, refusal = attacker.pick(
        (
            (b"INTERNAL The engine failed.", ours("The engine failed", "INTERNAL")),
            (b"nonsense", ours("REFUSAL is not as preprocess makes it")),
            (b"\xff\xfe \xff", ours("REFUSAL is not as preprocess makes it")),
            (b"", ours("REFUSAL is not as preprocess makes it")),
        )
    )
    model = contract.LANGUAGE_MODEL
    return attacker.attack("forged refusal", refusal, strings("REFUSAL", content), model=model)


def bad_reply(attacker: Attacker) -> Attack:
    reply = {
        "TEXT": strings("TEXT", b""),
        "WORDS": array("WORDS", (5, 6)),
        "KIND": strings("KIND", b"commentary"),
        "VIDEO_SPAN": array("VIDEO_SPAN", (0.0, 1.0)),
        "TURN": array("TURN", (3,)),
        "LAG": array("LAG", (0.0,)),
        "FINAL": ("FINAL", "BOOL", (1,), b"\1"),
        "ASKED": strings("ASKED"),
        "TOKENS": array("TOKENS", ()),
    }
    name, content, refusal = attacker.pick(
        (
            ("WORDS", array("WORDS", (5, -1)), ours("WORDS are token ids")),
            ("WORDS", array("WORDS", (VOCABULARY,)), ours("WORDS are token ids")),
            ("KIND", strings("KIND", b"\xff\xfe"), ours("KIND must be one of")),
            ("KIND", strings("KIND", b"nonsense"), ours("KIND must be one of")),
            ("KIND", strings("KIND"), "unexpected shape for input 'KIND'"),
            ("TURN", ("TURN", "INT32", (1,), bytes(4)), "data-type is 'INT32'"),
            ("WORDS", ("WORDS", "UINT8", (3,), bytes(3)), ours("WORDS is not packed")),
            ("FINAL", None, "missing required input"),
        )
    )
    tensors = (*(t for key, t in reply.items() if key != name), *([content] if content else []))
    return attacker.stray("bad reply", refusal, contract.POSTPROCESS, *tensors)


CALL_ATTACKS: tuple[Callable[[Attacker], Attack], ...] = (
    bad_question,
    bad_parameter,
    bad_opening,
    wrong_precision,
    second_start,
    unknown_session,
    wrong_number,
    wrong_form,
    wrong_model,
    forged_refusal,
    bad_reply,
)
