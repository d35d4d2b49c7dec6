// A whole model as a strict consumer uses it. It is compiled, never run.
import {
  type ChatMessage,
  type ChatOptions,
  type ChatPart,
  type ChatVideo,
  type Device,
  Qwen3VL,
  type Qwen3VLConfig,
  type Qwen3VLOptions,
  type Qwen3VLSampling,
  type Qwen3VLTokenizer,
} from 'p2r-kernels'

export async function load(folder: string, device: Device): Promise<number> {
  const options: Qwen3VLOptions = { dtype: 'bf16', onProgress: (done, of) => void (done / of) }
  using model = await Qwen3VL.load(folder, device, options)
  const config: Qwen3VLConfig = model.config
  const sampling: Qwen3VLSampling = model.sampling
  const [first]: readonly number[] = sampling.stopTokens
  return first ?? config.vocabSize
}

export async function layout(model: Qwen3VL): Promise<string> {
  const tokenizer: Qwen3VLTokenizer = await model.tokenizer()
  const part: ChatPart = { type: 'image' }
  const message: ChatMessage = { role: 'user', content: [part, { type: 'text', text: 'Where?' }] }
  const video: ChatVideo = { seconds: [0.5], tokens: 4 }
  const options: ChatOptions = { images: [16], videos: [video], prompt: false }
  return tokenizer.decode(tokenizer.encodeChat([message], options))
}
