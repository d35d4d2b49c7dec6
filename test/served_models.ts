// What servers answer to a chat completion of two choices, in the forms that their documentation and sources define,
// for the text 'A sign.' in three tokens, and the errors with which they refuse.

interface Answers {
  /** Without streaming. */
  whole: object
  /** The events of a stream. */
  stream: object[]
  /** A refusal: its status, its body and what it says. */
  refusal: [status: number, body: object, said: string]
}

const usage = { prompt_tokens: 4, completion_tokens: 3, total_tokens: 7 }
const head = { id: 'chatcmpl-1', created: 1_790_000_000, model: 'm' }
const chunk = { ...head, object: 'chat.completion.chunk' }
const whole = { ...head, object: 'chat.completion', usage }
const pieces = ['A', ' sign', '.']
const ids = [32, 1841, 13]
const logProbs = [-0.5, -0.25, -0.125]
const prompt = [151644, 872, 198, 151645]

const bytes = (text: string) => [...Buffer.from(text)]
/** The API's own form of log-probabilities. */
const entry = (i: number) => ({
  token: pieces[i],
  logprob: logProbs[i],
  bytes: bytes(pieces[i]!),
  top_logprobs: [],
})
const entries = pieces.map((_, i) => entry(i))

/** vLLM 0.11 and later, with --reasoning-parser. */
const vllm: Answers = {
  whole: {
    ...whole,
    prompt_logprobs: null,
    prompt_token_ids: prompt,
    kv_transfer_params: null,
    choices: [0, 1].map((index) => ({
      index,
      message: {
        role: 'assistant',
        content: 'A sign.',
        refusal: null,
        annotations: null,
        audio: null,
        function_call: null,
        tool_calls: [],
        reasoning: 'I look.',
      },
      logprobs: { content: entries.map((e, i) => ({ ...e, token: `token_id:${ids[i]}` })) },
      finish_reason: 'stop',
      stop_reason: null,
      token_ids: ids,
    })),
  },
  stream: [
    ...[0, 1].map((index) => ({
      ...chunk,
      prompt_token_ids: prompt,
      choices: [
        { index, delta: { role: 'assistant', content: '' }, logprobs: null, finish_reason: null },
      ],
    })),
    ...[0, 1].map((index) => ({
      ...chunk,
      choices: [{ index, delta: { reasoning: 'I look.' }, logprobs: null, finish_reason: null }],
    })),
    ...pieces.flatMap((content, i) =>
      [1, 0].map((index) => ({
        ...chunk,
        choices: [
          {
            index,
            delta: { content },
            logprobs: { content: [{ ...entry(i), token: `token_id:${ids[i]}` }] },
            finish_reason: i === 2 ? 'stop' : null,
            token_ids: [ids[i]],
          },
        ],
      })),
    ),
    { ...chunk, choices: [], usage },
  ],
  refusal: [
    400,
    { error: { message: 'At most 4 image(s)', type: 'BadRequestError', param: null, code: 400 } },
    'At most 4 image(s)',
  ],
}

/** SGLang 0.5.13 and later. */
const sglang: Answers = {
  whole: {
    ...whole,
    metadata: { weight_version: 'default' },
    choices: [0, 1].map((index) => ({
      index,
      message: {
        role: 'assistant',
        content: 'A sign.',
        reasoning_content: 'I look.',
        tool_calls: null,
      },
      logprobs: { content: entries },
      finish_reason: 'stop',
      matched_stop: 151645,
      prompt_token_ids: prompt,
      meta_info: {
        id: 'r',
        prompt_tokens: 4,
        completion_tokens: 3,
        output_token_logprobs: ids.map((id, i) => [logProbs[i], id, null]),
      },
    })),
  },
  stream: [0, 1].flatMap((index) => [
    {
      ...chunk,
      choices: [{ index, delta: { role: 'assistant', content: '' }, finish_reason: null }],
    },
    {
      ...chunk,
      choices: [{ index, delta: { reasoning_content: 'I look.' }, finish_reason: null }],
    },
    ...pieces.map((content, i) => ({
      ...chunk,
      choices: [
        { index, delta: { content }, logprobs: { content: [entry(i)] }, finish_reason: null },
      ],
    })),
    { ...chunk, choices: [{ index, delta: {}, finish_reason: 'stop', matched_stop: 151645 }] },
  ]),
  refusal: [
    400,
    {
      object: 'error',
      message: 'The input is too long.',
      type: 'BadRequestError',
      param: null,
      code: 400,
    },
    'The input is too long.',
  ],
}

/** Ollama 0.12.11 and later: one choice, whatever n is. */
const ollama: Answers = {
  whole: {
    ...whole,
    system_fingerprint: 'fp_ollama',
    choices: [
      {
        index: 0,
        message: { role: 'assistant', content: 'A sign.', reasoning: 'I look.' },
        finish_reason: 'stop',
        logprobs: { content: entries },
      },
    ],
  },
  stream: [
    {
      ...chunk,
      choices: [
        {
          index: 0,
          delta: { role: 'assistant', content: '', reasoning: 'I look.' },
          finish_reason: null,
        },
      ],
    },
    ...pieces.map((content, i) => ({
      ...chunk,
      choices: [
        {
          index: 0,
          delta: { role: 'assistant', content },
          finish_reason: null,
          logprobs: { content: [entry(i)] },
        },
      ],
    })),
    {
      ...chunk,
      choices: [{ index: 0, delta: { role: 'assistant', content: '' }, finish_reason: 'stop' }],
    },
  ],
  refusal: [
    404,
    { error: { message: "model 'm' not found", type: 'not_found_error', param: null, code: null } },
    "model 'm' not found",
  ],
}

const withId = (i: number) => ({ id: ids[i], ...entry(i) })
/** llama.cpp's server; a build that knows no n. */
const llamaCpp: Answers = {
  whole: {
    ...whole,
    system_fingerprint: 'b9000-abcdef0',
    timings: { prompt_n: 4, predicted_n: 3, predicted_ms: 30 },
    choices: [
      {
        index: 0,
        message: { role: 'assistant', reasoning_content: 'I look.', content: 'A sign.' },
        finish_reason: 'stop',
        logprobs: { content: pieces.map((_, i) => withId(i)) },
      },
    ],
  },
  stream: [
    {
      ...chunk,
      choices: [{ index: 0, delta: { role: 'assistant', content: null }, finish_reason: null }],
    },
    {
      ...chunk,
      choices: [{ index: 0, delta: { reasoning_content: 'I look.' }, finish_reason: null }],
    },
    ...pieces.map((content, i) => ({
      ...chunk,
      choices: [
        { index: 0, delta: { content }, finish_reason: null, logprobs: { content: [withId(i)] } },
      ],
    })),
    {
      ...chunk,
      choices: [{ index: 0, delta: {}, finish_reason: 'stop' }],
      timings: { prompt_n: 4, predicted_n: 3 },
    },
  ],
  refusal: [
    500,
    { error: { code: 500, message: 'image input is not supported', type: 'server_error' } },
    'image input is not supported',
  ],
}

export const servers = { vllm, sglang, ollama, llamaCpp }
export const expected = { ids, logProbs, prompt }
