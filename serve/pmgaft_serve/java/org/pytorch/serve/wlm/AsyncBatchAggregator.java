package org.pytorch.serve.wlm;

import java.net.HttpURLConnection;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import org.pytorch.serve.job.Job;
import org.pytorch.serve.util.messages.BaseModelRequest;
import org.pytorch.serve.util.messages.ModelInferenceRequest;
import org.pytorch.serve.util.messages.ModelLoadModelRequest;
import org.pytorch.serve.util.messages.ModelWorkerResponse;
import org.pytorch.serve.util.messages.Predictions;
import org.pytorch.serve.util.messages.RequestInput;

/**
 * Keeps the requests that one asynchronous worker has in hand. Stands before TorchServe 0.12's class of the same name on
 * the class path, because asynchronous mode cannot be relied on with that one:
 *
 * <ul>
 *   <li>it keeps the requests in a LinkedHashMap that two threads change, so that a busy server loses an entry, takes the
 *       answer for a protocol error and cuts the worker off (seen after some ten thousand quick requests);
 *   <li>when a worker dies, the requests it had in hand are never answered: their clients wait for ever;
 *   <li>a restarted worker is sent a request before its model is loaded, and is never marked READY again;
 *   <li>one failed request is answered to every request in hand.
 * </ul>
 */
public class AsyncBatchAggregator extends BatchAggregator {
    private final Map<String, Job> inHand = new ConcurrentHashMap<>();

    public AsyncBatchAggregator(Model model) {
        super(model);
    }

    /** Waits for the next job of the worker and hands it on. Called by the worker's thread alone. */
    @Override
    public BaseModelRequest getRequest(String threadName, WorkerState state)
            throws InterruptedException, ExecutionException {
        AsyncWorkerThread worker = worker();
        if (worker == null || worker.backendChannel.isEmpty() || !worker.backendChannel.get(0).isActive()) {
            throw new InterruptedException("The worker's connection is closed");
        }
        model.pollBatch(threadName, state == WorkerState.WORKER_MODEL_LOADED ? 0 : Long.MAX_VALUE, jobs);
        Job job = jobs.values().iterator().next();
        jobs.clear();
        if (job.isControlCmd()) {
            String gpu = job.getPayload().getStringParameter("gpu");
            return new ModelLoadModelRequest(model, gpu == null ? -1 : Integer.parseInt(gpu));
        }
        ModelInferenceRequest request = new ModelInferenceRequest(model.getModelName());
        request.setCommand(job.getCmd());
        request.addRequest(job.getPayload());
        inHand.put(job.getJobId(), job);
        return request;
    }

    /** Passes an answer of the worker on to its client. Called by the connection's thread. */
    @Override
    public boolean sendResponse(ModelWorkerResponse message) {
        for (Predictions answer : message.getPredictions()) {
            Job job = inHand.remove(answer.getRequestId());
            if (job == null) {
                continue;
            }
            if (message.getCode() == HttpURLConnection.HTTP_OK) {
                job.response(
                        answer.getResp(),
                        answer.getContentType(),
                        answer.getStatusCode(),
                        answer.getReasonPhrase(),
                        answer.getHeaders());
            } else {
                job.sendError(message.getCode(), message.getMessage());
            }
        }
        return true;
    }

    /** Answers a request that could not be handed to the worker. */
    @Override
    public void sendError(BaseModelRequest message, String error, int status) {
        if (message instanceof ModelInferenceRequest) {
            for (RequestInput input : ((ModelInferenceRequest) message).getRequestBatch()) {
                fail(inHand.remove(input.getRequestId()), status, error);
            }
        }
    }

    /** The worker is gone: answers what it had in hand, and lets the next one load its model before it gets work. */
    @Override
    public void cleanJobs() {
        for (String id : inHand.keySet()) {
            fail(inHand.remove(id), HttpURLConnection.HTTP_INTERNAL_ERROR, "Worker died.");
        }
        AsyncWorkerThread worker = worker();
        if (worker != null) {
            worker.loadingFinished = false;
        }
    }

    private static void fail(Job job, int status, String error) {
        if (job != null) {
            job.sendError(status, error);
        }
    }

    /** The worker this aggregator belongs to; null once it was taken off, at the server's end. */
    private AsyncWorkerThread worker() {
        for (WorkerThread thread : ModelManager.getInstance().getWorkers().values()) {
            if (thread.aggregator == this) {
                return (AsyncWorkerThread) thread;
            }
        }
        return null;
    }
}
