// A whole model as a strict consumer uses it. It is compiled, never run.
import {
  type ChatMessage,
  type ChatOptions,
  type ChatPart,
  type ChatVideo,
  type Device,
  type Generated,
  type GeneratedToken,
  type GenerationPrompt,
  LocalPolicy,
  type LocalPolicyOptions,
  type ModelServer,
  type PackedTokens,
  type Policy,
  Qwen3VL,
  type Qwen3VLCache,
  type Qwen3VLConfig,
  type Qwen3VLForwardArgs,
  type Qwen3VLGenerateArgs,
  type Qwen3VLImageRules,
  type Qwen3VLLogProbs,
  type Qwen3VLLogProbsArgs,
  type Qwen3VLOptions,
  type Qwen3VLResults,
  type Qwen3VLSampling,
  type Qwen3VLTokenizer,
  type Qwen3VLWant,
  type SamplingOptions,
  type ServeOptions,
  serveModel,
  type Tensor,
  type TokenLogProb,
  type Vision,
} from 'p2r-kernels'

export async function load(folder: string, device: Device): Promise<number> {
  const options: Qwen3VLOptions = {
    dtype: 'bf16',
    cacheTokens: 8192,
    onProgress: (done, of) => void (done / of),
  }
  using model = await Qwen3VL.load(folder, device, options)
  const config: Qwen3VLConfig = model.config
  const sampling: Qwen3VLSampling = model.sampling
  const rules: Qwen3VLImageRules = model.imageRules
  const [first]: readonly number[] = sampling.stopTokens
  return first ?? config.vocabSize + rules.maxPixels
}

export async function layout(model: Qwen3VL): Promise<string> {
  const tokenizer: Qwen3VLTokenizer = await model.tokenizer()
  const part: ChatPart = { type: 'image' }
  const message: ChatMessage = { role: 'user', content: [part, { type: 'text', text: 'Where?' }] }
  const video: ChatVideo = { seconds: [0.5], tokens: 4 }
  const options: ChatOptions = { images: [16], videos: [video], prompt: false }
  return tokenizer.decode(tokenizer.encodeChat([message], options))
}

export function passes(model: Qwen3VL, images: Vision): Tensor[] {
  const packed: PackedTokens = { tokens: [1, 2, 3], cuSeqlens: [0, 3], images }
  const want: Qwen3VLWant[] = ['final', 'logits']
  const a: Qwen3VLForwardArgs = { ...packed, want, rows: [2] }
  const some: Partial<Qwen3VLResults> = model.forward(a)
  const plain = model.forward(packed).logits
  // @ts-expect-error it was not wanted
  const missing = model.forward({ ...packed, want: ['final'] }).logits
  const cache: Qwen3VLCache = { kv: model.kvCache(512), sequences: [0] }
  model.forward({ ...packed, cache }).dispose()
  const scored: Qwen3VLLogProbsArgs = { ...packed, temperature: 0.5 }
  const { logProbs, entropy }: Qwen3VLLogProbs = model.logProbs(scored)
  return [plain, missing, logProbs, entropy, ...(some.hiddenStates ?? [])]
}

export async function texts(model: Qwen3VL, images: Vision): Promise<number[]> {
  const prompt: GenerationPrompt = { tokens: new Int32Array([1, 2]), images }
  const sampling: SamplingOptions = { temperature: 0.7, topK: 20, topP: 0.8 }
  const a: Qwen3VLGenerateArgs = {
    prompts: [prompt],
    n: 4,
    maxTokens: 64,
    ...sampling,
    stop: ['x'],
  }
  const [all = []]: Generated[][] = await model.generate(a)
  const tokens: number[] = all.flatMap((one) => one.tokens)
  for await (const step of model.stream(a)) {
    const one: GeneratedToken = step
    const top: TokenLogProb[] | undefined = one.topLogProbs
    if (top) tokens.push(...top.map(({ token }) => token))
    tokens.push(one.token)
  }
  return tokens
}

export async function serving(model: Qwen3VL): Promise<Policy> {
  const options: ServeOptions = { port: 0, apiKey: 'secret', logProbsMode: 'processed_logprobs' }
  const server: ModelServer = await serveModel(model, options)
  await server.close(1000)
  const local: LocalPolicyOptions = { maxTokens: 512, seed: 3 }
  return new LocalPolicy(model, local)
}
