// A JavaScript client, made from the proto alone:  node client.js OVERLAY_PROTO HOST:PORT PAYLOAD
// Loads @grpc/grpc-js from the current folder, and prints the results as one line of JSON.
const { createRequire } = require('node:module');
const load = createRequire(process.cwd() + '/');
const grpc = load('@grpc/grpc-js');
const { OverlayNode } = grpc.loadPackageDefinition(load('@grpc/proto-loader').loadSync(process.argv[2]));

const client = new OverlayNode(process.argv[3], grpc.credentials.createInsecure());
const seen = {};
const request = { payload: Buffer.from(process.argv[4]) };
const deadline = () => ({ deadline: Date.now() + 10000 });

const call = client.Forward(request, deadline(), (error, response) => {
  if (error) throw error;
  seen.result = response.result.toString();
  seen.hops = response.hops;
});
call.on('status', (status) => {
  seen.coverage = status.metadata.get('overlay-coverage')[0];
  client.Forward({ ...request, team: 'blue' }, deadline(), (error) => {
    seen.refusal = { code: error.code, details: error.details, executed: error.metadata.get('overlay-executed')[0] };
    client.close();
    console.log(JSON.stringify(seen));
  });
});
