// A byte-level BPE of some hundred tokens in the format of tokenizer.json, with the special tokens of the tied
// model of the reference data, and Qwen3-VL's chat template without tools.
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

const corpus = `What does the sign say? The sign says stop. Answer with a letter or a number. Describe this image.
Where is the evidence? Look at the crops and the boxes, then reason: the answer is in the picture.
{"bbox_2d": [400, 300, 600, 500], "label": "road sign"} <answer>A</answer> system user assistant seconds`

/** As bytes_to_unicode of GPT-2, from its description: bytes that print, and U+0100 on for the rest. */
const alphabet: string[] = (() => {
  const prints = new Set<number>()
  for (const [from, to] of [
    [0x21, 0x7e],
    [0xa1, 0xac],
    [0xae, 0xff],
  ] as const)
    for (let byte = from; byte <= to; byte++) prints.add(byte)
  let next = 0
  return Array.from({ length: 256 }, (_, byte) =>
    String.fromCharCode(prints.has(byte) ? byte : 0x100 + next++),
  )
})()

/** Splits as Qwen3's pre-tokenizer does, up to the case of contractions. */
const split =
  /'(?:[sdmt]|ll|re|ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+/gu

function train(merges: number): [string, string][] {
  const words = [...corpus.matchAll(split)].map(([word]) =>
    [...Buffer.from(word)].map((byte) => alphabet[byte]!),
  )
  const learned: [string, string][] = []
  while (learned.length < merges) {
    const counts = new Map<string, number>()
    for (const word of words)
      for (let i = 0; i + 1 < word.length; i++) {
        const pair = `${word[i]} ${word[i + 1]}`
        counts.set(pair, (counts.get(pair) ?? 0) + 1)
      }
    const best = [...counts].sort(([a, n], [b, m]) => m - n || (a < b ? -1 : 1))[0]
    if (!best) break
    const pair = best[0].split(' ') as [string, string]
    learned.push(pair)
    for (const word of words)
      for (let i = 0; i + 1 < word.length; i++)
        if (word[i] === pair[0] && word[i + 1] === pair[1]) word.splice(i, 2, pair.join(''))
  }
  return learned
}

const special = {
  '<|im_end|>': 501,
  '<|im_start|>': 502,
  '<|vision_start|>': 503,
  '<|vision_end|>': 504,
  '<|image_pad|>': 505,
  '<|video_pad|>': 506,
  '<|endoftext|>': 511,
}
const added = { '<tool_call>': 507, '</tool_call>': 508, '<think>': 509, '</think>': 510 }

export const ids: Record<string, number> = { ...special, ...added }

/** The content of a tokenizer.json. */
export function tinyTokenizer() {
  const merges = train(190)
  const tokens = [...alphabet, ...merges.map((pair) => pair.join(''))]
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: Object.entries(ids)
      .sort(([, a], [, b]) => a - b)
      .map(([content, id]) => ({
        id,
        content,
        single_word: false,
        lstrip: false,
        rstrip: false,
        normalized: false,
        special: content in special,
      })),
    normalizer: { type: 'NFC' },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        {
          type: 'Split',
          pattern: {
            Regex:
              "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
          },
          behavior: 'Isolated',
          invert: false,
        },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
      ],
    },
    post_processor: {
      type: 'ByteLevel',
      add_prefix_space: false,
      trim_offsets: false,
      use_regex: false,
    },
    decoder: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: false, use_regex: false },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: '',
      end_of_word_suffix: '',
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges,
    },
  }
}

export const chatTemplate = `{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
`

/** Adds the tokenizer and the template to a checkpoint's folder. */
export function writeTokenizer(folder: string): void {
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(tinyTokenizer()))
  writeFileSync(join(folder, 'chat_template.json'), JSON.stringify({ chat_template: chatTemplate }))
}
