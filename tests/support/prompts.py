"""Fifty prompts for the embedded model: prose, code, chat, other languages, arithmetic, noise."""

PROSE = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "The theory of relativity, proposed by Albert Einstein, states that",
    "In 1969, humans first",
    "Photosynthesis is the process by which",
    "It was the best of times, it was the worst of times,",
    "To make a good cup of tea, first",
    "The mitochondria is the powerhouse of the cell. Its main function is to",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three branches of the United States government are",
    "Water boils at 100 degrees Celsius at sea level, but at higher altitudes",
    "Chapter 1\n\nThe rain had been falling for three days when",
    "The main causes of the First World War were",
    "A headrace is the channel that brings water to",
)

CODE = (
    "def fibonacci(n):\n",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "#include <stdio.h>\n\nint main(void) {\n",
    "SELECT name, age FROM users WHERE",
    "function debounce(fn, wait) {\n  let timer = null;\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    '{"name": "Ada", "born": 1815, "languages": ["',
    "fn main() {\n    let v: Vec<i32> = vec![1, 2, 3];\n",
    "# Makefile\nall: build test\n\nbuild:\n\t",
    "<html>\n  <head>\n    <title>",
    "for i in range(10):\n    if i % 2 == 0:\n        print(",
)

QUESTIONS = (
    "What is the capital of Japan?",
    "Write a haiku about the sea.",
    "Explain gravity to a five-year-old.",
    "List three uses of a paperclip.",
    "Translate 'good morning' into French.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "What should I do if my computer does not start?",
    "Summarize: The cat sat on the mat. The dog came in. The cat left.",
    "Write a Python function that reverses a string.",
)
CHAT = tuple(
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    for question in QUESTIONS
)

LANGUAGES = (
    "中国的首都是",
    "人工智能是",
    "今天天气很好，我们",
    "从前有一座山，山里有一座庙，",
    "La tour Eiffel se trouve à",
    "Der schnelle braune Fuchs springt",
    "El sol sale por",
    "東京は日本の",
)

ARITHMETIC_AND_NOISE = (
    "2 + 2 =",
    "12 * 12 = 144\n13 * 13 =",
    "1, 1, 2, 3, 5, 8, 13,",
    "If x + 3 = 10, then x =",
    "The square root of 81 is",
    "🎉🎉🎉 Happy birthday 🎂",
    "a b c d e f g",
)

PROMPTS = PROSE + CODE + CHAT + LANGUAGES + ARITHMETIC_AND_NOISE
assert len(PROMPTS) == 50
