/** Shares a tensor with a PyTorch process, which negates it in place. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { Command } from 'commander'
import { openDevice } from 'p2r-kernels'

const { device: id } = new Command('exchange')
  .option('--device <id>', "'cpu', 'cuda', 'cuda:1' (default: $P2R_DEVICE, else CUDA, else CPU)")
  .parse()
  .opts<{ device?: string }>()

using device = openDevice(id)
const tensor = device.tensor([1, -2, 3, -4], [2, 2])
using handle = await tensor.ipcHandle()

// From dist/examples/exchange to the source that Python runs.
const script = fileURLToPath(new URL('../../../examples/exchange/tensors.py', import.meta.url))
const python = spawn('python3', [script], { stdio: ['pipe', 'pipe', 'inherit'] })
const lines = createInterface({ input: python.stdout })
python.stdin.end(`${JSON.stringify(handle)}\n`)
for await (const line of lines) console.log(`Python: ${line}`)
const [code] = python.exitCode === null ? await once(python, 'exit') : [python.exitCode]
if (code) process.exitCode = 1
else console.log(`Here: ${await tensor.read()}`)
