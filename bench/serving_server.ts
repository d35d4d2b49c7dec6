// The server of the serving benchmark: answers every chat request after a fixed time, with a box for a
// perceiver and with A for a reasoner. Its parent asks how many it has answered.
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'

const delay = Number(process.argv[2])
let answered = 0

const server = createServer((request, response) => {
  const chunks: Buffer[] = []
  request.on('data', (chunk) => chunks.push(chunk))
  request.on('end', () => {
    const arrived = performance.now()
    // The prompt is at the end, after megabytes of images that need not be parsed.
    const end = Buffer.concat(chunks).subarray(-4000).toString('latin1')
    const perceives = /bbox_2d/.test(end)
    const content = perceives
      ? '[{"bbox_2d": [200, 200, 500, 600], "label": "it"}]'
      : '<think>It is.</think><answer>A</answer>'
    const n = Number(/"n":(\d+)/.exec(end)?.[1] ?? 1)
    const logprobs = {
      content: [{ token: 'token_id:1', logprob: -1, bytes: null, top_logprobs: [] }],
    }
    const message = { role: 'assistant', content, refusal: null }
    const choices = Array.from({ length: n }, (_, index) => ({
      index,
      finish_reason: 'stop',
      message,
      logprobs,
    }))
    const body = JSON.stringify({ id: 'x', object: 'chat.completion', model: 'm', choices })
    setTimeout(
      () => {
        answered++
        response.writeHead(200, { 'content-type': 'application/json' }).end(body)
      },
      delay - (performance.now() - arrived),
    )
  })
})
server.keepAliveTimeout = 60_000
server.listen(0, '127.0.0.1', () => process.send?.((server.address() as AddressInfo).port))
process.on('message', () => process.send?.(answered))
process.on('disconnect', () => process.exit())
