// A server on loopback that implements as much of the OpenAI chat API as its script does, correctly or not.
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'

export interface ChatRequest {
  // biome-ignore lint/suspicious/noExplicitAny: what a client sent
  body: any
  headers: IncomingMessage['headers']
  /** The prompt, and the bytes of its images. */
  prompt: string
  system: string
  images: Buffer[]
  /** The bytes of the images of all messages. */
  shown: Buffer[]
  /** Which request this is, from 0. */
  at: number
}

export type Reply = (request: ChatRequest, response: ServerResponse) => unknown

export interface ChatServer {
  baseURL: string
  requests: ChatRequest[]
  /** Maximum number of concurrent requests. */
  most: number
  /** What it says it serves. */
  models: string[]
  close(): Promise<void>
}

/** Answers each request by the script, whose last entry answers all that come after it. */
export async function chatServer(...script: Reply[]): Promise<ChatServer> {
  let open = 0
  const state: Omit<ChatServer, 'close'> = { baseURL: '', requests: [], most: 0, models: ['m'] }
  const server = createServer(async (message, response) => {
    open++
    state.most = Math.max(state.most, open)
    response.on('close', () => open--)
    const chunks: Buffer[] = []
    for await (const chunk of message) chunks.push(chunk)
    if (message.url === '/v1/models')
      return send(response, 200, { object: 'list', data: state.models.map((id) => ({ id })) })
    if (message.url !== '/v1/chat/completions') return response.writeHead(404).end()
    const body = JSON.parse(Buffer.concat(chunks).toString())
    const user = body.messages.find((m: { role: string }) => m.role === 'user')
    const imagesOf = (content: unknown): Buffer[] =>
      Array.isArray(content)
        ? content
            .filter(({ type }) => type === 'image_url')
            .map(({ image_url: { url } }) => Buffer.from(url.split(',')[1]!, 'base64'))
        : []
    const request: ChatRequest = {
      body,
      headers: message.headers,
      prompt: user.content.find((c: { type: string }) => c.type === 'text').text,
      system: body.messages.find((m: { role: string }) => m.role === 'system')?.content ?? '',
      images: imagesOf(user.content),
      shown: body.messages.flatMap((m: { content: unknown }) => imagesOf(m.content)),
      at: state.requests.length,
    }
    state.requests.push(request)
    await script[Math.min(request.at, script.length - 1)]!(request, response)
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  state.baseURL = `http://127.0.0.1:${(server.address() as AddressInfo).port}/v1`
  return Object.assign(state, {
    close: () =>
      new Promise<void>((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      }),
  })
}

type Words = string | { content?: string | null; refusal?: string; tokens?: number[] }

/** The choices of an answer: texts, refusals, and tokens with log-probabilities of -id / 100. */
export function choices(...all: Words[]): object[] {
  return all.map((words, index) => {
    const { content, refusal, tokens } = typeof words === 'string' ? { content: words } : words
    return {
      index,
      finish_reason: 'stop',
      message: { role: 'assistant', content: content ?? null, refusal: refusal ?? null },
      ...(tokens && {
        logprobs: {
          content: tokens.map((id) => ({ token: `token_id:${id}`, logprob: -id / 100, bytes: [] })),
        },
      }),
    }
  })
}

export const send = (response: ServerResponse, status: number, body: unknown, headers = {}) =>
  response
    .writeHead(status, { 'content-type': 'application/json', ...headers })
    .end(JSON.stringify(body))

/** Responds with the same text for each of the n choices. */
export const says =
  (f: Words | ((request: ChatRequest) => Words)): Reply =>
  (request, response) => {
    const words = typeof f === 'function' ? f(request) : f
    const n = request.body.n ?? 1
    send(response, 200, { object: 'chat.completion', choices: choices(...Array(n).fill(words)) })
  }

/** A call of a tool as the API has it; arguments that are no text are written as JSON. */
export const call = (name: string, given: unknown, id = 'call-1'): object => ({
  id,
  type: 'function',
  function: { name, arguments: typeof given === 'string' ? given : JSON.stringify(given) },
})

/** Responds with these calls, for each of the n choices. */
export const callsTools =
  (...calls: object[]): Reply =>
  (request, response) =>
    send(response, 200, {
      choices: Array.from({ length: request.body.n ?? 1 }, (_, index) => ({
        index,
        finish_reason: 'tool_calls',
        message: { role: 'assistant', content: null, tool_calls: calls },
      })),
    })

export const fails =
  (status: number, message: string, headers = {}): Reply =>
  (_, response) =>
    send(response, status, { error: { message, type: 'x', code: status } }, headers)
