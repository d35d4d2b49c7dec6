// A conversation with images as a prompt of the model.
import { pixelValues, smartResize } from '../../ops/crop_resample.js'
import { scope } from '../../scope.js'
import { imageSize, type Tensor } from '../../tensor.js'
import type { Qwen3VL } from './model.js'
import type { Vision } from './prompt.js'
import type { ChatMessage, ChatOptions, Qwen3VLTokenizer } from './tokens.js'

/** A prompt whose patches are freed with it. */
export interface ChatPrompt extends Disposable {
  tokens: number[]
  images?: Vision
}

/** The patches of images, resized as the checkpoint's processor does. */
export function patchesOf(
  model: Qwen3VL,
  images: readonly Tensor<'u8'>[],
  op: string,
): Vision | undefined {
  if (!images.length) return undefined
  const { patchSize, temporalPatchSize, mergeSize } = model.tower.config
  const { minPixels, maxPixels, mean, std } = model.imageRules
  return scope(() => {
    const own = images.map((image) =>
      image.device === model.device ? image : image.to(model.device),
    )
    const regions = own.map((image, i) => {
      const [height, width] = imageSize(image, op, `images[${i}]`)
      const factor = patchSize * mergeSize
      const size = smartResize(height, width, {
        factor,
        minPixels,
        maxPixels,
        rules: 'transformers',
      })
      return { image: i, box: [0, 0, width, height] as const, ...size }
    })
    const { pixelValues: patches, gridThw } = pixelValues({
      images: own,
      regions,
      patchSize,
      temporalPatchSize: temporalPatchSize as 1 | 2,
      mergeSize,
      mean,
      std,
      dtype: model.tower.dtype,
    })
    return { pixelValues: patches, gridThw }
  })
}

/** The beginning of a conversation whose tokens are known, up to the end of what a message says. */
export interface KnownTokens {
  tokens: readonly number[]
  /** The message's place. */
  message: number
  /** How many of the images are in it. */
  images: number
}

/** The tokens of a conversation whose image parts are these images, in their order. */
export function chatPrompt(
  model: Qwen3VL,
  tokenizer: Qwen3VLTokenizer,
  a: {
    messages: readonly ChatMessage[]
    images: readonly Tensor<'u8'>[]
    template?: Readonly<Record<string, unknown>>
    known?: KnownTokens | undefined
  },
  op: string,
): ChatPrompt {
  const images = patchesOf(model, a.images, op)
  const dispose = (): void => images?.pixelValues.dispose()
  try {
    const { mergeSize } = model.tower.config
    const counts = images?.gridThw.map(([t, h, w]) => (t * h * w) / mergeSize ** 2) ?? []
    const { template, known } = a
    const options = { images: counts, ...(template && { template }) }
    const tokens =
      (known && continued(tokenizer, a.messages, known, options)) ??
      tokenizer.encodeChat(a.messages, options)
    return { tokens, ...(images && { images }), [Symbol.dispose]: dispose }
  } catch (error) {
    dispose()
    throw error
  }
}

function continued(
  tokenizer: Qwen3VLTokenizer,
  messages: readonly ChatMessage[],
  { tokens, message, images }: KnownTokens,
  options: ChatOptions & { images: readonly number[] },
): number[] | undefined {
  const rest = tokenizer.encodeAfter(messages, message, {
    ...options,
    images: options.images.slice(images),
  })
  // The token that ended the message is the first of what the template puts behind it.
  return rest && [...tokens, ...(rest[0] === tokens.at(-1) ? rest.slice(1) : rest)]
}
