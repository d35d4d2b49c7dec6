import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

// Tests use the built package, as its users do.
export default defineConfig({
  resolve: {
    alias: { 'p2r-kernels': fileURLToPath(new URL('./dist/lib/index.js', import.meta.url)) },
  },
  test: {
    include: ['test/**/*.test.ts'],
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: 60_000,
    server: { deps: { external: [/\/dist\//] } },
  },
})
