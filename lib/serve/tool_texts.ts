// Calls of tools in a model's text, as Qwen3-VL's template asks for them and vLLM's parser 'hermes' reads them.
import { isJsonObject } from '../arguments.js'

/** A call, with its arguments as JSON. */
export interface CalledTool {
  name: string
  arguments: string
}

const [open, close] = ['<tool_call>', '</tool_call>']

/** A call as the model writes it. */
export function toolText({ name, arguments: given }: CalledTool): string {
  return `${open}\n{"name": ${JSON.stringify(name)}, "arguments": ${given}}\n${close}`
}

/**
 * Divides a text that comes piece by piece into what is said and what is called. A call that is none stays text; white
 * space beside calls is dropped.
 */
export class ToolTexts {
  #held = ''
  #called = false

  /** What can be told. */
  push(text: string): { text: string; calls: CalledTool[] } {
    this.#held += text
    return this.#take(false)
  }

  /** The rest; a call that the end cuts off is one if its JSON is whole. */
  end(): { text: string; calls: CalledTool[] } {
    return this.#take(true)
  }

  #take(isEnd: boolean): { text: string; calls: CalledTool[] } {
    const calls: CalledTool[] = []
    let said = ''
    const say = (text: string): void => {
      if (!this.#called || text.trim() !== '') said += text
    }
    for (;;) {
      const at = this.#held.indexOf(open)
      if (at < 0) {
        let keep = isEnd ? 0 : Math.min(open.length - 1, this.#held.length)
        while (keep > 0 && !open.startsWith(this.#held.slice(-keep))) keep--
        say(this.#held.slice(0, this.#held.length - keep))
        this.#held = this.#held.slice(this.#held.length - keep)
        return { text: said, calls }
      }
      say(this.#held.slice(0, at))
      this.#held = this.#held.slice(at)
      const end = this.#held.indexOf(close)
      if (end < 0 && !isEnd) return { text: said, calls }
      const whole = end < 0 ? this.#held : this.#held.slice(0, end + close.length)
      const call = readCall(whole.slice(open.length, end < 0 ? undefined : end))
      this.#held = this.#held.slice(whole.length)
      if (call) {
        calls.push(call)
        this.#called = true
      } else {
        said += whole
      }
    }
  }
}

function readCall(text: string): CalledTool | undefined {
  try {
    const json: unknown = JSON.parse(text)
    if (!isJsonObject(json) || typeof json.name !== 'string') return undefined
    return { name: json.name, arguments: JSON.stringify(json.arguments ?? {}) }
  } catch {
    return undefined
  }
}
