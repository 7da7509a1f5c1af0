package org.pytorch.serve.http;

import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelOption;
import io.netty.channel.SimpleChannelInboundHandler;
import io.netty.channel.unix.DomainSocketChannel;
import io.netty.handler.codec.DecoderException;
import io.netty.handler.codec.http.FullHttpRequest;
import io.netty.handler.codec.http.HttpMethod;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpServerKeepAliveHandler;
import io.netty.handler.codec.http.QueryStringDecoder;
import java.util.Map;
import java.util.Set;
import org.pytorch.serve.archive.DownloadArchiveException;
import org.pytorch.serve.archive.model.ModelException;
import org.pytorch.serve.archive.model.ModelNotFoundException;
import org.pytorch.serve.archive.model.ModelVersionNotFoundException;
import org.pytorch.serve.archive.workflow.WorkflowNotFoundException;
import org.pytorch.serve.util.ConfigManager;
import org.pytorch.serve.util.NettyUtils;
import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * The end of a connection's pipeline: hands each request to the chain, and answers what fails there. Stands before
 * TorchServe 0.12's class of the same name on the class path, because of what that one does to a server that strangers
 * can reach:
 *
 * <ul>
 *   <li>a form that cannot be decoded stays in memory for good, so that some hundred of them end the server's service;
 *   <li>such a form, and an address with a broken escape, are answered as if the server had failed, or forbade it;
 *   <li>a connection is reset when it is closed (SO_LINGER 0), which takes with it what is not yet sent of the answer;
 *   <li>a client that asks for its connection to be closed, or speaks HTTP/1.0, waits for that in vain;
 *   <li>a request may take for ever to arrive (see ReceiveDeadline), an answer for ever to be read (see OneAtATime);
 *   <li>it answers at a dozen other addresses, and to any method, whatever is open.
 * </ul>
 */
public class HttpRequestHandler extends SimpleChannelInboundHandler<FullHttpRequest> {
    private static final Logger logger = LoggerFactory.getLogger(HttpRequestHandler.class);

    private static final Map<String, Set<HttpMethod>> METHODS =
            Map.of(
                    "/predictions/pmgaft", Set.of(HttpMethod.POST, HttpMethod.OPTIONS),
                    "/ping", Set.of(HttpMethod.GET, HttpMethod.HEAD));

    private static final String FORM =
            "This form cannot be decoded. It needs a boundary, and each part a name, no Content-Transfer-Encoding"
                    + " but 7bit, 8bit or binary, and if any a character set that exists; or it needs whole escapes.";

    private final HttpRequestHandlerChain chain;

    public HttpRequestHandler(HttpRequestHandlerChain chain) {
        this.chain = chain;
    }

    @Override
    public void handlerAdded(ChannelHandlerContext context) {
        context.channel().config().setOption(ChannelOption.SO_LINGER, -1);
        int limit = ConfigManager.getInstance().getMaxRequestSize();
        context.pipeline().addBefore("aggregator", null, new ReceiveDeadline());
        context.pipeline().replace("aggregator", null, new BodyLimit(limit, Long.getLong("pmgaft.request_bytes", limit)));
        context.pipeline().addBefore(context.name(), null, new OneAtATime());
        context.pipeline().addBefore(context.name(), null, new HttpServerKeepAliveHandler());
    }

    @Override
    protected void channelRead0(ChannelHandlerContext context, FullHttpRequest request) {
        try {
            NettyUtils.requestReceived(context.channel(), request);
            if (!request.decoderResult().isSuccess()) {
                throw new BadRequestException("Invalid HTTP message.");
            }
            QueryStringDecoder address = new QueryStringDecoder(request.uri());
            if (!(context.channel() instanceof DomainSocketChannel)) {
                check(request.method(), address.path());
            }
            chain.handleRequest(context, request, address, address.path().split("/"));
        } catch (DecoderException | StringIndexOutOfBoundsException error) {
            refuse(context, new BadRequestException(FORM));
            // A decoder that throws while it is made keeps its hold of the content, and nobody has the decoder.
            if (request.refCnt() > 1) {
                request.release(request.refCnt() - 1);
            }
        } catch (IllegalArgumentException error) {
            refuse(context, new BadRequestException("This address cannot be decoded: " + error.getMessage()));
        } catch (Throwable error) {
            refuse(context, error);
        }
    }

    /** Whether strangers may ask this. */
    private static void check(HttpMethod method, String path) {
        if (!METHODS.containsKey(path)) {
            throw new ResourceNotFoundException();
        }
        if (!METHODS.get(path).contains(method)) {
            throw new MethodNotAllowedException();
        }
    }

    private static void refuse(ChannelHandlerContext context, Throwable error) {
        HttpResponseStatus status = statusOf(error);
        if (status == HttpResponseStatus.INTERNAL_SERVER_ERROR) {
            logger.error("", error);
        }
        NettyUtils.sendError(context, status, error);
    }

    @Override
    public void exceptionCaught(ChannelHandlerContext context, Throwable error) {
        logger.error("", error);
        if (error instanceof OutOfMemoryError) {
            NettyUtils.sendError(context, HttpResponseStatus.INSUFFICIENT_STORAGE, error);
        }
        context.close();
    }

    private static HttpResponseStatus statusOf(Throwable error) {
        if (error instanceof ResourceNotFoundException
                || error instanceof ModelNotFoundException
                || error instanceof ModelVersionNotFoundException
                || error instanceof WorkflowNotFoundException) {
            return HttpResponseStatus.NOT_FOUND;
        }
        if (error instanceof ConflictStatusException) {
            return HttpResponseStatus.CONFLICT;
        }
        if (error instanceof RequestTimeoutException) {
            return HttpResponseStatus.REQUEST_TIMEOUT;
        }
        if (error instanceof MethodNotAllowedException) {
            return HttpResponseStatus.METHOD_NOT_ALLOWED;
        }
        if (error instanceof ServiceUnavailableException) {
            return HttpResponseStatus.SERVICE_UNAVAILABLE;
        }
        if (error instanceof OutOfMemoryError) {
            return HttpResponseStatus.INSUFFICIENT_STORAGE;
        }
        if (error instanceof BadRequestException
                || error instanceof ModelException
                || error instanceof DownloadArchiveException) {
            return HttpResponseStatus.BAD_REQUEST;
        }
        return HttpResponseStatus.INTERNAL_SERVER_ERROR;
    }
}
