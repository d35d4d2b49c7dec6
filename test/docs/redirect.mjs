// Sends requests for port 8000, which the documents' examples use, to the server at P2R_TEST_SERVER.
const { fetch } = globalThis

globalThis.fetch = (url, init) =>
  fetch(String(url).replace(/^http:\/\/[^/]+:8000\/v1/, process.env.P2R_TEST_SERVER), init)
